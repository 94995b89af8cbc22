"""Formats whose linears take int8 inputs: `+a8` is stored, and everything that reads it computes so."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import kbitc
from kbitc.artifact.reader import Artifact
from kbitc.cli.app import app
from kbitc.errors import UsageError
from kbitc.formats.spec import parse
from kbitc.tensor.activations import use_activations
from kbitc.tensor.kbit_tensor import KbitTensor

PLAN = {"weights": {"*embed*": {"spec": "int8:64"}, "*": {"spec": "int8:65536+out2%+a8"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("a8") / "out"
    kbitc.compile("demo", plan=PLAN, out=out, quantizer="absmax")
    return out


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits


IDS = torch.arange(3, 35)[None]


def test_the_spec_says_so():
    spec = parse("int8:576+dq+out1%+a8")
    assert spec.has_int8_inputs
    assert str(spec) == "int8:576+dq+out1%+a8"
    assert parse(str(spec)) == spec
    for text in ("int8:64+zp+a8", "int4:64+a8", "nf8:64+a8"):
        with pytest.raises(UsageError, match="int8 without zero points"):
            parse(text)
    with pytest.raises(UsageError, match="int8:96\\+a8"):
        kbitc.quantize(torch.randn(4, 96), "int8:64+a8")
    with pytest.raises(UsageError, match="experts have no int8 matmul"):
        kbitc.quantize(torch.randn(2, 4, 96), "int8:96+a8")


def test_a_weight_multiplies_in_integers():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 96), torch.randn(5, 96)
    x[:, 3] *= 50
    packed = kbitc.quantize(weight, "int8:96+out3%+a8")
    assert packed.activations == "int8"
    wanted = torch.ops.kbit.linear_int8(x, *packed.operands(), None)
    assert torch.equal(torch.nn.functional.linear(x, packed), wanted)
    plain = torch.nn.functional.linear(x, kbitc.quantize(weight, "int8:96+out3%"))
    assert not torch.equal(wanted, plain)
    assert float((wanted - plain).norm() / plain.norm()) < 0.02


def test_an_artifact_loads_as_it_was_planned(folder):
    specs = {str(spec) for spec in Artifact.open(folder).specs.values()}
    assert "int8:65536+out2%+a8" in specs
    model = kbitc.load(folder, dtype=torch.float32)
    kinds = {p.activations for n, p in model.named_parameters() if isinstance(p, KbitTensor) and "proj" in n}
    assert kinds == {"int8"}
    own = logits(model, IDS)
    floats = kbitc.load(folder, dtype=torch.float32)
    use_activations(floats, "float")
    other = logits(floats, IDS)
    assert not torch.equal(own, other)
    assert float((own - other).norm() / other.norm()) < 0.03


def test_the_graph_and_torch_compile_agree(folder):
    model = kbitc.load(folder, dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, IDS), logits(model, IDS))


def test_the_command_line_runs_and_says_so(folder):
    run = CliRunner().invoke(app, ["run", str(folder), "Once upon", "-n", "4"])
    assert run.exit_code == 0, run.output
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    assert "+a8" in shown.stdout


def test_an_evaluation_says_what_the_linears_took(folder):
    scores = {}
    for asked in ([], ["--activations", "int8"], ["--activations", "float"]):
        done = CliRunner().invoke(app, ["eval", str(folder), "--limit-tokens", "600", "--json", *asked])
        assert done.exit_code == 0, done.output
        score = json.loads(done.stdout)
        scores[asked[-1] if asked else "own"] = (score["activations"], score["loss"])
    assert scores["own"] == scores["int8"]
    assert scores["own"][0] == "int8"
    assert scores["float"][0] == "float"
    assert scores["float"][1] != scores["own"][1]


def test_a_dtype_to_compute_in(folder):
    run = ["run", str(folder), "Once upon", "-n", "2", "--backend", "eager", "--dtype"]
    assert CliRunner().invoke(app, [*run, "float32"]).exit_code == 0
    wrong = CliRunner().invoke(app, [*run, "flaot32"])
    assert "did you mean 'float32'" in str(wrong.exception)


def test_onnx_rounds_its_inputs_too(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    kbitc.export_onnx(folder, tmp_path / "onnx")
    import onnx

    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    levels = [
        a.i
        for n in graph.node
        if n.op_type == "MatMulNBits"
        for a in n.attribute
        if a.name == "accuracy_level"
    ]
    assert levels.count(4) >= 6 * 7
    checks = CliRunner().invoke(app, ["verify", str(tmp_path / "onnx"), "--json"])
    assert checks.exit_code == 0, checks.output
