"""Plans for another program: in its formats and bytes, as its file shows."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import kbitc
from kbitc.backends import find_target
from kbitc.backends.onnx_export.container import choose_container
from kbitc.backends.onnx_export.target import OnnxTarget, contained
from kbitc.checkpoint import open_checkpoint
from kbitc.cli.app import app
from kbitc.compiler.request import Request
from kbitc.errors import BudgetError, UsageError
from kbitc.evaluation import onnx_verify
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.program import Use, Weight
from kbitc.passes.canonicalize import Canonicalize
from kbitc.planning.replanning import replan
from kbitc.sensitivity.score_table import ScoreTable


def weights_of(model):
    with open_checkpoint(model) as checkpoint:
        return Canonicalize().run(capture(checkpoint.skeleton())).weights


SPECS = (
    "int4:32+dq",
    "sint4:16+dq",
    "sint4:128",
    "int8:64+dq",
    "int4:32+zp+dq",
    "int4:20+zp",
    "int8:32+out3%",
    "sint4:32+dq+out3%",
)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow), "roberta"]
)
def test_bytes_are_those_of_the_file(family, tiny_model, tmp_path):
    pytest.importorskip("onnxruntime")
    model = tiny_model(family)
    weights = weights_of(model)
    plan = {name: {"spec": SPECS[i % len(SPECS)]} for i, name in enumerate(weights)}
    packed = kbitc.compile(model, plan={"format": 1, "weights": plan}, quantizer="absmax")
    report = kbitc.export_onnx(packed, tmp_path / "onnx")
    found = {name: entry["bytes"] for name, entry in report["weights"].items()}
    wanted = {
        name: OnnxTarget().weight_bytes(weight, parse(plan[name]["spec"])) for name, weight in weights.items()
    }
    assert found == wanted
    assert all(check.is_passed for check in onnx_verify.verify(tmp_path / "onnx", packed))


def test_a_budget_is_kept_in_the_file(tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "packed"
    runner = CliRunner()
    command = ["compile", "demo", "--bits", "4.5", "--for", "onnx", "--quantizer", "weighted", "--json"]
    done = runner.invoke(app, [*command, "--calibrate", "random", "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["for"]["target"] == "onnx"
    report = kbitc.export_onnx(out, tmp_path / "onnx")
    assert all(entry["error"] == 0.0 for entry in report["weights"].values())
    stored = sum(entry["bytes"] for entry in report["weights"].values())
    stored += sum(entry["bytes"] for entry in report["left_alone"].values())
    assert stored <= 1.02 * 4.5 * said["parameters"] / 8
    assert stored == pytest.approx(said["for"]["bytes"], rel=0.01)
    assert ScoreTable.open(out).target == "onnx"
    again = replan(out, 5.0)
    assert {entry["spec"] for entry in again["weights"].values()} <= {*map(str, contained()), "fp16"}


def test_every_native_format_is_held_exactly():
    torch.manual_seed(0)
    values = torch.randn(8, 256)
    for spec in contained():
        container = choose_container(kbitc.quantize(values, str(spec)).packed, "fp32")
        assert container.is_exact, spec
        assert sum(container.widths) == spec.bits


def test_what_does_not_fit_is_listed_with_its_bits(tiny_model):
    names = list(weights_of(tiny_model("llama")))
    plan = dict.fromkeys(names, {"spec": "int4:32+dq"})
    plan[names[1]], plan[names[2]] = {"spec": "nf4:64"}, {"spec": "int3:64"}
    request = {"plan": {"format": 1, "weights": plan}, "target": "onnx", "quantizer": "absmax"}
    with pytest.raises(UsageError, match="2 weights of the plan") as caught:
        kbitc.compile(tiny_model("llama"), **request)
    said = str(caught.value)
    assert f"{names[1]}: nf4:64 becomes" in said
    assert f"{names[2]}: int3:64 becomes MatMulNBits 4, " in said
    assert names[0] not in said
    plan[names[1]] = plan[names[2]] = {"spec": "fp16"}  # 32 bits there, and asked for
    kbitc.compile(tiny_model("llama"), **request)


def test_an_export_says_what_each_weight_takes_before_it_writes(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    kbitc.compile("demo", spec="nf3:64", out=tmp_path / "packed")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "packed"), "-o", str(tmp_path / "onnx")])
    assert done.exit_code == 0, done.stderr
    assert "--for onnx" in " ".join(done.stderr.split())


def test_tables_that_are_looked_up_alone_take_any_code():
    table = Weight("t", (100, 64), torch.float16, (Use("node", "embedding"),))
    linear = Weight("w", (100, 64), torch.float16, (Use("node", "linear"),))
    target = find_target("onnx")
    assert target.misfit(table, parse("nf3:64")) == ""
    assert target.misfit(linear, parse("nf3:64")) != ""
    assert target.weight_bytes(table, parse("nf3:64")) < target.weight_bytes(linear, parse("int4:64"))
    assert {spec.bits for spec in target.candidates(linear)} == {4, 8}


def test_types_restrict_the_choice(tiny_model):
    packed = kbitc.compile(
        tiny_model("llama"), 4.5, types=["int", "nf"], quantizer="absmax", calibrate="none"
    )
    specs = [p.spec for p in packed.parameters() if isinstance(p, kbitc.KbitTensor)]
    assert specs
    assert {spec.family for spec in specs} <= {"int", "nf"}
    with pytest.raises(BudgetError):
        kbitc.compile(tiny_model("llama"), 2.5, types=["int"], target="onnx", calibrate="none")
    with pytest.raises(UsageError, match="did you mean 'int'"):
        Request(bits=4.0, types=["itn"])
    with pytest.raises(UsageError, match="--bits alone"):
        Request(spec="nf4:64", types=["nf"])


def test_own_kernels_hold_everything():
    assert find_target("cpu") is None
    assert find_target("triton") is None
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        find_target("onx")
