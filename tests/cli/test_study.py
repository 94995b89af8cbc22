"""``kbitc sweep``, ``scaling`` and ``advise``, one after another."""

from __future__ import annotations

import json

import pytest

from kbitc.checkpoint import demo


@pytest.fixture(scope="module")
def swept(kbitc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "text.txt").write_text(demo.heldout().read_text("utf-8")[:4000], "utf-8")
    done = kbitc(
        "sweep", "demo", "--bits", "3-4", "--types", "int", "--blocks", "64", "--text", folder / "text.txt",
        "--context", "32", "--limit-tokens", "256", "-o", folder / "r.parquet", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"table": str(folder / "r.parquet"), "rows": 3, "ran": 3, "known": 0}
    return folder


def test_scaling(kbitc, swept):
    done = kbitc("scaling", swept / "r.parquet", "-o", swept / "page.html")
    assert done.returncode == 0, done.stderr
    assert "not testable here" in done.stdout
    assert "<title>kbitc: Scaling of k-bit models" in (swept / "page.html").read_text("utf-8")
    assert (swept / "page-types.png").exists()
    told = json.loads(kbitc("scaling", swept / "r.parquet", "--json").stdout)
    assert "1 models; a fit takes 4 sizes" in told["fits"]["joint"]["reason"]


def test_advise(kbitc, swept):
    done = kbitc("advise", "--from", swept / "r.parquet", "--memory", "1GB", "--json")
    (first,) = json.loads(done.stdout)["advice"]
    assert first["format"] == "fp16"
    assert first["interval"][0] < first["loss"] < first["interval"][1]
    assert first["command"].startswith("kbitc compile demo --spec fp16")
    assert "kbitc compile demo" in kbitc("advise", "--from", swept / "r.parquet", "--memory", "1GB").stdout


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--bits", "9"], "within 2 to 8"),
        (["--types", "intt"], "did you mean 'int'"),
        (["--scope", "linar"], "did you mean 'linear'"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--outliers", "2%"], "proxy:2%"),
        (["--tasks", "copaa"], "did you mean 'copa'"),
        (["--limit", "3"], "--tasks"),
    ],
)
def test_bad_input_is_one_paragraph(kbitc, swept, arguments, said):
    done = kbitc("sweep", "demo", "--text", swept / "text.txt", "-o", swept / "other.parquet", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (swept / "other.parquet").exists()


def test_tasks(kbitc, swept):
    pytest.importorskip("lm_eval")
    rows = [{"query": "The file was missing, because", "choices": ["it was deleted.", "so."], "gold": 0}] * 2
    (swept / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = swept / "tasks.parquet"
    done = kbitc(
        "sweep", "demo", "--bits", "4", "--types", "int", "--text", swept / "text.txt", "--context", "32",
        "--limit-tokens", "64", "--tasks", "copa", "--data", swept, "-o", table,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "highest mean accuracy by bits of a code, percent; copa[2]" in " ".join(done.stdout.split())
    advice = kbitc("advise", "--from", table, "--memory", "1GB", "--by", "accuracy", "--json").stdout
    (first,) = json.loads(advice)["advice"]
    assert first["tasks"].startswith("copa[2], 0 shots")
    told = kbitc("advise", "--from", table, "--memory", "1GB", "--by", "accuracy").stdout
    assert "accuracy on copa[2]" in " ".join(told.split())


def test_no_table(kbitc, tmp_path):
    for arguments in (
        ["scaling", tmp_path / "no.parquet"],
        ["advise", "--from", tmp_path / "no.parquet", "--memory", "1GB"],
    ):
        done = kbitc(*arguments)
        assert done.returncode == 2
        assert "kbitc sweep" in done.stderr
