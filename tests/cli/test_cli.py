"""The command line: exit codes, one-paragraph errors, JSON for machines, nothing written on failure."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest

from kbitc import cli
from kbitc.artifact.evaluations import EVAL_FILE, read_evaluations
from kbitc.checkpoint import demo


def kbitc(*arguments, cwd="."):
    """As ``python -m kbitc``, but in this process: importing PyTorch for every command takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["kbitc", *map(str, arguments)])
        cli.main()
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


def test_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kbitc", "compile", "demo", "--bits", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "between 2 and 8" in done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "demo"
    done = kbitc("compile", "demo", "--bits", "4", "-o", out, "--json", "--strict")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_compile_json_keeps_the_budget(compiled):
    out, data = compiled
    assert data["bits_per_param"] <= 4.0
    payload = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert data["bytes"] <= payload
    assert data["weights"]
    assert data["left_alone"]


def test_another_budget_from_the_score_table(compiled, tmp_path):
    out, _ = compiled
    done = kbitc("plan", out, "--bits", "3.5", "-o", tmp_path / "plan.json", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert 3.45 < data["bits_per_param"] <= 3.5
    assert json.loads((tmp_path / "plan.json").read_text()) == data
    again = kbitc("compile", "demo", "--plan", tmp_path / "plan.json", "--dry-run", "--json")
    assert json.loads(again.stdout)["bits_per_param"] == pytest.approx(data["bits_per_param"], abs=1e-9)
    done = kbitc("plan", tmp_path, "--bits", "3.5")
    assert done.returncode == 2
    assert "kbit_scores.json" in done.stderr
    shown = kbitc("plan", out, "--bits", "3.5")
    assert shown.returncode == 0, shown.stderr
    rows = [line for line in shown.stdout.splitlines() if re.match(r"│ +\d\.\d\d ", line)]
    assert "3.50" in "".join(rows)
    assert len(rows) >= 3  # the trade-off around the budget


def test_eval_reports_the_bits_of_the_file(compiled):
    from kbitc.artifact.reader import Artifact

    out, data = compiled
    done = kbitc("eval", out, "--limit-tokens", "1024", "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    stored = sum(tensor.nbytes for _, tensor in Artifact.open(out).tensors())
    assert score["bits_per_param"] == pytest.approx(8 * stored / data["parameters"], rel=1e-3)
    assert score["bytes"] == stored
    assert {"perplexity", "tokens", "bits_per_param", "bytes"} <= set(score)
    assert score["tokens"] == 4 * 255


def test_eval_against_the_source(compiled):
    out, _ = compiled
    done = kbitc("eval", out, "--against", "demo", "--limit-tokens", "512", "--json", "--record")
    score = json.loads(done.stdout)
    assert 0 < score["kl_divergence"] < 0.5
    (kept,) = read_evaluations(out / EVAL_FILE)
    assert kept.loss == score["loss"]
    assert kept.divergence == score["kl_divergence"]
    done = kbitc("eval", "demo", "--limit-tokens", "512", "--record")
    assert done.returncode == 2
    assert "no artifact" in done.stderr


def test_run_continues_a_prompt(compiled):
    out, _ = compiled
    eager = ("--backend", "eager")
    done = kbitc("run", out, "The function", "-n", "8", *eager)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The function")
    assert len(done.stdout) > len("The function") + 5
    assert "tokens/s (eager)" in done.stderr
    data = json.loads(kbitc("run", out, "The function", "-n", "8", "--json", *eager).stdout)
    assert data["text"] in done.stdout
    assert data["backend"] == "eager"


def test_inspect_artifact_and_model(compiled, tmp_path):
    out, data = compiled
    page, graph = tmp_path / "r.html", tmp_path / "g.dot"
    done = kbitc("inspect", out, "--html", page, "--dot", graph, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert set(shown["weights"]) == set(data["weights"])
    assert shown["fusions"] == data["fusions"]
    assert len(shown["fusions"]["merge_linears"]["groups"]) == 2 * 6  # layers
    assert "merge_linears: fired 12 times (30 names), left" in kbitc("inspect", out).stdout
    assert "<table>" in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", "")  # one file, nothing fetched
    assert graph.read_text().count('label="linear"') == len(data["weights"])
    model = json.loads(kbitc("inspect", "demo", "--json").stdout)
    assert model["weights"]["model.embed_tokens.weight"]["aliases"] == ["lm_head.weight"]
    assert model["parameters"] == data["parameters"]
    assert model["fusions"].pop("fold_norms")["groups"]
    assert model["fusions"] == data["fusions"]


def test_bench_measures_both(compiled):
    out, _ = compiled
    done = kbitc(
        "bench", out, "-n", "2", "--prompt-tokens", "8", "--runs", "1", "--json", "--backend", "eager"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == {"packed", "16-bit"}
    for row in rows.values():
        assert row["decode"] > 0
        assert row["prefill"] > 0
        assert row["peak_bytes"] > row["bytes"] > 0


def test_tables_for_people(compiled, tmp_path):
    done = kbitc("compile", "demo", "--spec", "nf4:64", "-o", tmp_path / "x")
    assert done.returncode == 0
    assert "stored bits per parameter" in done.stdout
    assert "nf4:64" in done.stdout
    dry = kbitc("compile", "demo", "--spec", "nf4:64", "--dry-run", "-o", tmp_path / "y")
    assert "nothing was written" in dry.stdout
    assert not (tmp_path / "y").exists()


def test_passes_are_listed_edited_and_watched(tmp_path):
    listed = json.loads(kbitc("passes", "--json").stdout)
    assert {"name", "runs", "needs", "gives", "requires", "provides", "summary"} == set(listed[0])
    runs = {about["name"]: about["runs"] for about in listed}
    assert (runs["canonicalize"], runs["fuse_dequantize"], runs["merge_linears"]) == (
        "compile",
        "lowering 1",
        "lowering 3",
    )
    page = tmp_path / "passes.html"
    done = kbitc(
        "compile", "demo", "--dry-run", "--spec", "nf4:64", "--passes", "canonicalize,apply_plan",
        "--passes-html", page, "--print-diff", "apply_plan", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"]["model.embed_tokens.weight"]["spec"] == "nf4:64"
    assert done.stderr.startswith("changes of apply_plan:\n--- before\n+++ after\n")
    assert "0 … 5 (6 alike)" in page.read_text()
    assert "http" not in page.read_text()


@pytest.mark.parametrize(
    "command",
    [[], ["compile"], ["plan"], ["inspect"], ["passes"], ["run"], ["eval"], ["bench"], ["build-kernels"]],
)
def test_help_has_examples(command):
    done = kbitc(*command, "--help")
    assert done.returncode == 0
    assert "$ kbitc" in done.stdout or not command


BAD = [
    (["compile", "./nowhere", "--bits", "4"], 1, "no such file or folder"),
    (["compile", "demo", "--bits", "1"], 2, "between 2 and 8"),
    (["compile", "demo", "--bits", "9"], 2, "between 2 and 8"),
    (["compile", "demo", "--bits", "four"], 2, "Invalid value"),
    (["compile", "demo", "--spec", "nf4x:64"], 2, "is not a spec"),
    (["compile", "demo", "--spec", "xx4:64"], 2, "no data type 'xx'"),
    (["compile", "demo", "--spec", "nf4:0"], 2, "block size 0"),
    (["compile", "demo", "--spec", "nf4:64", "--bits", "4"], 2, "exactly one"),
    (["compile", "demo", "--plan", "none.json"], 2, "cannot be read"),
    (["compile", "demo", "--spec", "nf4:64", "-o", "/proc/x"], 2, "cannot be written|not a writable"),
    (["compile"], 2, "Missing argument"),
    (["compile", "demo", "--disable", "alocate_bits"], 2, "did you mean 'allocate_bits'"),
    (["compile", "demo", "--passes", "canonicalize"], 2, "only a program of stage PLANNED can be packed"),
    (
        ["compile", "demo", "--spec", "nf4:64", "--passes", "canonicalize,score_sensitivity,allocate_bits"],
        2,
        "add it, or leave",
    ),
    (["compile", "demo", "--print-after", "allocate"], 2, "no pass of this pipeline 'allocate'"),
    (["run", "demo-none", "hi"], 1, "no such file or folder"),
    (["eval", "demo", "--text", "none.txt"], 2, "cannot be read"),
    (["eval", "demo", "--context", "1"], 2, "takes 2 to"),
    (["run", "demo", "hi", "--backend", "cqu"], 2, "did you mean 'cpu'"),
    (["bench", "demo", "--backend", "onnxx"], 2, "no backend 'onnxx'"),
    (["nonsense"], 2, "No such command"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_usage_is_one_paragraph(arguments, code, message, tmp_path):
    done = kbitc(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_output_needs_force(compiled):
    out, _ = compiled
    done = kbitc("compile", "demo", "-o", out)
    assert done.returncode == 2
    assert "--force" in done.stderr


def test_plan_with_an_unknown_weight(compiled, tmp_path):
    out, _ = compiled
    plan = json.loads((out / "kbit_plan.json").read_text())
    plan["weights"]["model.layers.0.self_attn.qq_proj.weight"] = {"spec": "nf4:64"}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    done = kbitc("compile", "demo", "--plan", tmp_path / "p.json", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "did you mean 'model.layers.0.self_attn.q_proj.weight'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path):
    """A file system with no room: /dev/full does not take folders, so a size limit stands in."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"sys.argv = ['kbitc', 'compile', 'demo', '--spec', 'nf4:64', '-o', {str(tmp_path / 'out')!r}]\n"
        "from kbitc.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_model_is_small_and_has_its_text():
    size = sum(p.stat().st_size for p in demo.folder().iterdir())
    assert size <= 8_000_000
    assert demo.heldout().stat().st_size > 20_000


def test_demo_quality(compiled):
    """4 bits a parameter cost little perplexity on text that the model has not seen."""
    out, _ = compiled
    before = json.loads(kbitc("eval", "demo", "--limit-tokens", "6000", "--json").stdout)["perplexity"]
    after = json.loads(kbitc("eval", out, "--limit-tokens", "6000", "--json").stdout)["perplexity"]
    assert before < after < 1.10 * before
