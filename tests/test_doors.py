"""What another package adds by entry points: one file each, and no edit of ours.

The package is a few files on PYTHONPATH with the ``.dist-info`` folder that an installer would write. One process
runs all commands with it, another those with a package that is broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import kbitc
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.reader import Artifact
from kbitc.backends import make_decoder
from kbitc.checkpoint import open_checkpoint
from kbitc.errors import UsageError

ROOT = Path(__file__).parent.parent
PROMPT = "The function returns"

DATA_TYPE = '''
import numpy as np
from kbitc.formats.datatypes import family

@family("cubic", candidates={4: (64,)})
def cubic(request):
    """Cubes of evenly spaced levels: dense around zero."""
    return np.linspace(-1, 1, 2**request.bits - 1) ** 3
'''

QUANTIZER = '''
from dataclasses import dataclass, replace
from kbitc.tensor.packing import draft

@dataclass(frozen=True)
class Halved:
    """Half of the largest magnitude as each block's scale."""

    requires = ()

    def quantize(self, weight, spec, evidence):
        made = draft(weight, spec, outliers=evidence.outliers, name=evidence.name)
        return replace(made, scales=made.scales / 2).packed()
'''

PASS = '''
from dataclasses import dataclass, replace
from kbitc.formats import parse
from kbitc.graph import Choice, Plan, Stage

@dataclass(frozen=True)
class KeepHead:
    """Leaves the output head at 8 bits."""

    needs = Stage.PLANNED
    gives = Stage.PLANNED

    def run(self, program):
        heads = [name for name, weight in program.weights.items() if weight.is_head]
        kept = dict.fromkeys(heads, Choice(parse("int8:64"), "output head"))
        return replace(program, plan=Plan({**program.plan.weights, **kept}))
'''

DECODING = '''
from dataclasses import dataclass
from kbitc.backends import Decoder

class Contrary(Decoder):
    """Takes the least likely token."""

    name = "contrary"

    def prefill(self, ids, cache=None):
        logits, cache = super().prefill(ids, cache)
        return -logits, cache

@dataclass(frozen=True)
class Backend:
    def missing(self):
        return None

    def decoder(self, model):
        return Contrary(model)
'''

EXPORTING = """
from dataclasses import dataclass
from pathlib import Path
from kbitc.artifact.reader import Artifact

@dataclass(frozen=True)
class Listing:
    format = "listing"

    def missing(self):
        return None

    def export(self, model, folder, *, force=False):
        Path(folder).mkdir(exist_ok=force)
        specs = Artifact.open(Path(model)).specs
        Path(folder, "specs.txt").write_text("".join(f"{name} {spec}\\n" for name, spec in specs.items()))
        return {"files": 1}
"""

RUN = """
import contextlib, io, json, sys
from unittest.mock import patch

commands, python = json.loads(sys.stdin.read())
from kbitc.cli import console, main

done = []
for command in commands:
    out, err, code = io.StringIO(), io.StringIO(), 0
    console.out.file, console.err.file = out, err
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch.object(sys, "argv", ["kbitc", *command]):
        try:
            main()
        except SystemExit as end:
            code = end.code
    done.append({"code": code, "out": out.getvalue(), "err": " ".join(err.getvalue().split())})
values = {}
exec(python, values)
print(json.dumps([done, values.get("value")]))
"""


def package(folder, name, files, points):
    """What an installer would leave of a package: modules, and what they add, by group."""
    folder.mkdir()
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [line for group, added in points.items() for line in (f"[{group}]", *added)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(folder, commands, python=""):
    """Commands of kbitc and a piece of Python, in one process that has the package of a folder.

    Returns:
        Exit code, output and errors of each by its key; and ``value`` of the Python.
    """
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([list(commands.values()), python]), text=True,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results, value = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(commands, results, strict=True)), value


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Every command with the package, run once: the folder of what they wrote, their results, a value."""
    out = tmp_path_factory.mktemp("doors")
    extra = package(
        out / "extra",
        "kbitc_extra",
        {
            "extra_cubic": DATA_TYPE,
            "extra_halved": QUANTIZER,
            "extra_keep_head": PASS,
            "extra_contrary": DECODING,
            "extra_listing": EXPORTING,
        },
        {
            "kbitc.datatypes": ["cubic = extra_cubic:cubic"],
            "kbitc.quantizers": ["halved = extra_halved:Halved"],
            "kbitc.passes": ["keep_head = extra_keep_head:KeepHead"],
            "kbitc.backends": ["contrary = extra_contrary:Backend", "listing = extra_listing:Listing"],
        },
    )
    demo = ["compile", "demo", "--json"]
    nf4 = [*demo, "--spec", "nf4:64"]
    again = {
        "weights": {"*": "cubic4:64", "model.embed_tokens.weight": {"spec": "nf4:64", "quantizer": "halved"}}
    }
    (out / "plan.json").write_text(json.dumps(again))
    commands = {
        "data type": [*demo, "--spec", "cubic4:64", "-o", f"{out}/cubic"],
        "quantizer": [*nf4, "--quantizer", "halved", "-o", f"{out}/halved"],
        "plan": [*demo, "--plan", f"{out}/plan.json", "-o", f"{out}/planned"],
        "pass": [*nf4, "--passes", "canonicalize,apply_plan,keep_head", "-o", f"{out}/kept"],
        "backend": ["run", f"{out}/kept", PROMPT, "-n", "4", "--backend", "contrary", "--json"],
        "export": ["export", f"{out}/cubic", "--format", "listing", "-o", f"{out}/listing"],
        "export's option": [
            "export",
            f"{out}/cubic",
            "--format",
            "listing",
            "-o",
            "x",
            "--storage",
            "compact",
        ],
        "passes": ["passes", "--json"],
        "quantizers": ["quantizers", "--json"],
        "no data type": [*demo, "--spec", "cubid4:64", "-o", f"{out}/x"],
        "no quantizer": [*nf4, "--quantizer", "halfed", "-o", f"{out}/x"],
        "no pass": [*nf4, "--passes", "canonicalize,apply_plan,keep_hed", "-o", f"{out}/x"],
        "no backend": ["run", f"{out}/kept", PROMPT, "--backend", "contrari"],
        "no format": ["export", f"{out}/cubic", "--format", "listings", "-o", f"{out}/x"],
    }
    python = f"""
import kbitc, torch
from kbitc.checkpoint import open_checkpoint
model = kbitc.load({str(out / "cubic")!r})
weight = model.get_input_embeddings().weight
with open_checkpoint("demo") as demo:
    dense = demo.read("model.embed_tokens.weight").float()
error = float((weight.dequantize().float() - dense).norm() / dense.norm())
again = kbitc.quantize(dense, "cubic4:64").dequantize()
same = bool((weight.dequantize().float() - again.to(weight.dtype).float()).abs().max() == 0)
torch.manual_seed(0)  # weights that the cubes fit better than any other levels
small = torch.nn.Linear(256, 64, bias=False)
small.weight.data = torch.randint(-7, 8, (64, 256)).float() ** 3
small.weight.data[:, ::64] = 343
small = kbitc.compile(small, bits=5, calibrate="none", example_inputs=(torch.ones(1, 256),))
value = [str(weight.spec), error, same, str(small.weight.spec)]
"""
    results, value = run(extra, commands, python)
    return out, results, value


def choices(folder):
    """Spec and quantizer of each weight that an artifact packed, as its plan file has them."""
    weights = json.loads((folder / PLAN_FILE).read_text())["weights"]
    return {name: (entry["spec"], entry["quantizer"]) for name, entry in weights.items()}


def succeeded(result):
    assert result["code"] == 0, result["err"]
    return result


def test_a_data_type(outside):
    out, results, (spec, error, is_same, _) = outside
    succeeded(results["data type"])
    assert {spec for spec, _ in choices(out / "cubic").values()} == {"cubic4:64"}
    (levels,) = (t for key, t in stored(out / "cubic").items() if "codebook" in key)
    wanted = torch.linspace(-1, 1, 15, dtype=torch.float64) ** 3
    torch.testing.assert_close(levels.double().flatten()[:15], wanted, rtol=1e-6, atol=1e-7)
    assert spec == "cubic4:64"
    assert is_same
    assert 0.05 < error < 0.2


def test_a_budget_spends_on_a_data_type(outside):
    """Of all candidates the planner takes it for a weight that it fits."""
    _, _, (*_, spec) = outside
    assert spec == "cubic4:64+dq"


def test_a_quantizer(outside):
    out, results, _ = outside
    succeeded(results["quantizer"])
    assert set(choices(out / "halved").values()) == {("nf4:64", "halved")}
    made = kbitc.load(out / "halved").get_input_embeddings().weight.packed
    with open_checkpoint("demo") as demo:
        plain = kbitc.quantize(demo.read("model.embed_tokens.weight"), "nf4:64").packed
    assert torch.equal(made.scales, plain.scales / 2)
    assert not torch.equal(made.planes, plain.planes)
    assert "halved" in {entry["name"] for entry in json.loads(results["quantizers"]["out"])}


def test_a_plan_names_a_data_type_and_a_quantizer(outside):
    out, results, _ = outside
    succeeded(results["plan"])
    planned = choices(out / "planned")
    assert planned.pop("model.embed_tokens.weight") == ("nf4:64", "halved")
    assert set(planned.values()) == {("cubic4:64", "absmax")}


def test_a_pass(outside):
    out, results, _ = outside
    succeeded(results["pass"])
    specs = {name: spec for name, (spec, _) in choices(out / "kept").items()}
    assert specs.pop("model.embed_tokens.weight") == "int8:64"  # the head is tied to it
    assert set(specs.values()) == {"nf4:64"}
    assert str(kbitc.load(out / "kept").lm_head.weight.spec) == "int8:64"
    listed = {entry["name"]: entry for entry in json.loads(results["passes"]["out"])}
    assert listed["keep_head"]["summary"] == "Leaves the output head at 8 bits."


@torch.inference_mode()
def test_a_backend_that_decodes(outside):
    out, results, _ = outside
    told = json.loads(succeeded(results["backend"])["out"])
    assert told["backend"] == "contrary"
    eager = make_decoder(kbitc.load(out / "kept"), "eager")
    tokenizer = AutoTokenizer.from_pretrained(out / "kept")
    logits, cache = eager.prefill(tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    least = []
    for _ in range(4):
        least.append(int(logits.argmin()))
        logits = eager.step(least[-1], cache)
    assert told["text"].rstrip("\ufffd") == tokenizer.decode(least, skip_special_tokens=True).rstrip("\ufffd")


def test_a_backend_that_exports(outside):
    out, results, _ = outside
    assert str(out / "listing") in succeeded(results["export"])["out"]
    lines = (out / "listing" / "specs.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {spec}" for name, (spec, _) in choices(out / "cubic").items())
    assert results["export's option"]["code"] == 2
    assert "--storage: the format 'listing' has no such option" in results["export's option"]["err"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no data type", "no data type 'cubid'; did you mean 'cubic'?"),
        ("no quantizer", "no quantizer 'halfed'; did you mean 'halved'?"),
        ("no pass", "no pass 'keep_hed'; did you mean 'keep_head'?"),
        ("no backend", "no backend 'contrari'; did you mean 'contrary'?"),
        ("no format", "no format 'listings'; did you mean 'listing'?"),
    ],
)
def test_a_name_that_is_near(outside, wrong, message):
    out, results, _ = outside
    assert message in results[wrong]["err"]
    assert results[wrong]["code"] == 2
    assert not (out / "x").exists()


def test_what_was_made_is_read_without_the_package(outside):
    """A pass and a quantizer leave plain artifacts; a data type has to be known, and is named."""
    out, _, _ = outside
    for name in ("halved", "kept"):
        Artifact.open(out / name).verify()
    with pytest.raises((UsageError, kbitc.errors.SourceError), match="cubic"):
        kbitc.load(out / "cubic")


def stored(folder):
    """Every tensor in the files of an artifact, by its name; needs no data type to be known."""
    from safetensors.torch import load_file

    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


BROKEN = {
    "quantizer": ("kbitc.quantizers", ["compile", "demo", "--spec", "nf4:64", "--quantizer", "broken"]),
    "pass": ("kbitc.passes", ["compile", "demo", "--spec", "nf4:64", "--passes", "canonicalize,broken"]),
    "backend": ("kbitc.backends", ["run", "demo", PROMPT, "--backend", "broken"]),
    "data type": ("kbitc.datatypes", ["compile", "demo", "--spec", "broken4:64"]),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    out = tmp_path_factory.mktemp("broken")
    points = {group: ["broken = not_there:Thing"] for group, _ in BROKEN.values()}
    points["kbitc.backends"] = ["broken = typed_wrongly:Thing"]
    extra = package(out / "extra", "kbitc_broken", {"typed_wrongly": "def class:\n"}, points)
    commands = {kind: command for kind, (_, command) in BROKEN.items()}
    commands["others"] = ["run", "demo", PROMPT, "-n", "2", "--backend", "eager", "--json"]
    results, _ = run(extra, commands)
    return results


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_point_names_its_package(broken, kind):
    message = broken[kind]["err"]
    assert f"the {kind} 'broken' of the package 'kbitc_broken' cannot be loaded from" in message
    assert ("SyntaxError" if kind == "backend" else "No module named 'not_there'") in message
    assert broken[kind]["code"] == 1


def test_a_broken_entry_point_hides_nothing_else(broken):
    assert json.loads(succeeded(broken["others"])["out"])["backend"] == "eager"
