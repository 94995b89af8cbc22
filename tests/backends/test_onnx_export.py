"""ONNX export: every format against the dequantized weight, families against PyTorch, errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import kbitc
from kbitc import errors
from kbitc.backends import find_backend, make_decoder
from kbitc.backends.onnx_export.geometry import make_geometry
from kbitc.checkpoint.demo import heldout
from kbitc.cli import app
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation import onnx_verify
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.perplexity import perplexity, read_text, windows
from kbitc.formats import datatypes

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
ir = pytest.importorskip("onnx_ir", reason="needs the extra [onnx]")
pytest.importorskip("onnxscript", reason="needs the extra [onnx]")

from kbitc.backends.onnx_export.container import ACTIVATIONS, choose_container  # noqa: E402  # it needs the packages
from kbitc.backends.onnx_export.emit import Emitter  # noqa: E402  # it needs the packages
from kbitc.backends.onnx_export.export import export_onnx  # noqa: E402  # it needs the packages
from kbitc.backends.onnx_export.initializers import ExportOptions  # noqa: E402  # it needs the packages
from kbitc.backends.onnx_export.runtime import OnnxModel  # noqa: E402  # it needs the packages
from kbitc.backends.onnx_export.weight import OnnxWeight  # noqa: E402  # it needs the packages

KINDS = ("linear", "embedding", "tied")
# What the activations' rounding costs beside the container's, relative to the result.
ROUNDING = {"fp32": 0.0, "split": 3e-4, "int8": 4e-2}


def one_graph(weights, options):
    """All weights in one graph: each as a linear of x, as an embedding of ids, and as both in one."""
    features = next(iter(weights.values())).in_features
    x = ir.Value(name="x", shape=ir.Shape(["m", features]), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([x, ids], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="all")
    emitter, lowered = Emitter(graph), {}
    for name, packed in weights.items():
        for kind in KINDS:
            weight = OnnxWeight(emitter, f"{name}.{kind}", packed, options)
            out = (
                weight.linear(x, 2, None)
                if kind == "linear"
                else weight.embedding(ids, 1, is_shared=kind == "tied")
            )
            out.name, out.type = f"{name}.{kind}", ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(out)
            lowered[name, kind] = weight
    graph.extend(emitter.take())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]), lowered


def check(specs, rows, features, options):
    torch.manual_seed(0)
    dense = torch.randn(rows, features) * torch.rand(rows, 1)
    packed = {spec: kbitc.quantize(dense, spec) for spec in specs}
    session, lowered = one_graph({spec: weight.packed for spec, weight in packed.items()}, options)
    names = [out.name for out in session.get_outputs()]
    for count in (1, 64):
        x, ids = torch.randn(count, features), torch.randint(0, rows, (count,))
        found = dict(zip(names, session.run(None, {"x": x.numpy(), "ids": ids.numpy()})))
        for (spec, kind), weight in lowered.items():
            read = packed[spec].dequantize().double()
            wanted = x.double() @ read.T if kind == "linear" else read[ids]
            got = torch.from_numpy(found[f"{spec}.{kind}"]).double()
            limit = 1e-5
            if kind == "linear" or (kind == "tied" and not options.is_compact):
                container = weight.container
                noise = float((read - dense).norm() / read.norm())
                assert container.error <= 0.03 * noise, (spec, container)
                # One row of few features may meet more of the error than the weight's mean.
                limit += 3 * container.error + (ROUNDING[options.activations] if kind == "linear" else 0)
            assert got.shape == wanted.shape
            error = float((got - wanted).norm() / wanted.norm())
            assert error <= limit, (spec, kind, count, error, limit)


ALL = [f"{family}{bits}" for family in datatypes.FAMILIES for bits in range(2, 9)]


@pytest.mark.parametrize("flag", ["", "+zp", "+dq"])
def test_every_format(flag):
    check([f"{name}:32{flag}" for name in ALL], 37, 100, ExportOptions())


@pytest.mark.parametrize("storage", ["direct", "compact"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_storages_and_activations(storage, activations):
    names = [f"{family}{bits}" for family in ("int", "nf") for bits in range(2, 9)]
    specs = [f"{name}:32{flag}" for name in names for flag in ("", "+zp", "+dq")]
    check(specs, 19, 76, ExportOptions(storage, activations))


@pytest.mark.parametrize(
    ("block", "features", "flag"),
    [
        (7, 45, "+dq"),
        (20, 100, "+zp"),
        (24, 100, "+zp+out5%"),
        (48, 100, ""),
        (64, 128, "+out2%"),
        (256, 700, "+dq"),
        (512, 100, "+zp+dq"),
        (1024, 3000, "+zp"),
        (16, 33, ""),
    ],
)
def test_any_block(block, features, flag):
    specs = [f"{name}:{block}{flag}" for name in ("int2", "int3", "int4", "int8", "nf4", "bof3", "fp5")]
    for options in (ExportOptions(), ExportOptions("direct", "split"), ExportOptions("compact", "int8")):
        check(specs, 13, features, options)


def test_blocks_hold_every_weight_once():
    for features in (1, 16, 31, 100, 128, 700):
        for block in (1, 2, 7, 16, 20, 32, 48, 96, 128, 1024):
            for smallest in (16, 32):
                found = make_geometry(features, block, smallest)
                assert found.group in (16, 32, 64, 128)
                assert found.group >= smallest
                codes = torch.arange(1, features + 1)[None]
                spread = found.spread(codes, 0)
                assert spread.shape == (1, found.stored)
                assert spread[spread > 0].tolist() == codes[0].tolist()
                scales = found.repeat(torch.arange(1, found.count + 1)[None])
                assert scales.shape == (1, found.groups)
                mine = scales.repeat_interleave(found.group, 1)[spread > 0]
                assert mine.tolist() == [i // found.block + 1 for i in range(features)]


def test_containers_are_the_narrowest_that_are_exact():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    expected = {
        ("int4:64", "fp32"): (4,),
        ("int3:64+zp", "fp32"): (4,),
        ("int8:64", "fp32"): (4, 4),
        ("int2:64", "int8"): (2,),
        ("int5:64", "int8"): (8,),
        ("fp4e2:64", "split"): (8,),
        ("nf4:64", "fp32"): (4, 4, 4),
        ("nf4:64", "int8"): (8, 2),
    }
    for (spec, activations), widths in expected.items():
        assert choose_container(kbitc.quantize(weight, spec).packed, activations).widths == widths


def packed_model(tiny_model, family, spec):
    return kbitc.compile(tiny_model(family), spec=spec)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("t5", "bof4:32"),
        pytest.param("llama", "int4:32", marks=pytest.mark.slow),  # as the demo model below
        pytest.param("gpt2", "nf3:32+dq", marks=pytest.mark.slow),
        pytest.param("opt", "int3:20+zp", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "int4:32+out3%", marks=pytest.mark.slow),
        pytest.param("mixtral", "nf4:16+dq", marks=pytest.mark.slow),
        pytest.param("roberta", "int5:32", marks=pytest.mark.slow),
    ],
)
def test_families(family, spec, tiny_model, tmp_path):
    model = packed_model(tiny_model, family, spec)
    report = export_onnx(model, tmp_path / "out")
    packed = {name for name, p in model.named_parameters() if isinstance(p, kbitc.KbitTensor)}
    assert set(report["weights"]) == packed
    checks = onnx_verify.verify(tmp_path / "out", model)
    assert all(found.is_passed for found in checks), [found for found in checks if not found.is_passed]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    kbitc.compile("demo", spec="int4:64", out=folder / "packed")
    report = kbitc.export_onnx(folder / "packed", folder / "onnx")
    return folder, report


def test_demo_decodes_and_scores_as_in_torch(demo):
    folder, report = demo
    ours, theirs = (open_model(str(folder / name), torch.float32) for name in ("onnx", "packed"))
    ids = theirs.tokenizer("The function returns", return_tensors="pt")["input_ids"]
    wanted = list(make_decoder(theirs.model, "eager").generate(ids, 64))
    assert list(make_decoder(ours.model).generate(ids, 64)) == wanted
    text = read_text(heldout())
    ids = windows(ours.model, ours.tokenizer, text, 128, 1280)
    scores = [perplexity(loaded.model, ids).perplexity for loaded in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    payload = kbitc.Artifact.open(folder / "packed").payload_bytes
    assert report["files"]["model.onnx.data"] <= 1.03 * payload
    head = report["weights"]["model.embed_tokens.weight"]
    assert head["uses"] == ["embedding", "linear"]
    assert head["container"] == "MatMulNBits 4"


def test_command_line(demo):
    folder, _ = demo
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(folder / "onnx"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    done = runner.invoke(app, ["run", str(folder / "onnx"), "The", "-n", "4", "--json"])
    assert json.loads(done.stdout)["backend"] == "onnx"
    done = runner.invoke(app, ["export", str(folder / "packed"), "-o", "x", "--format", "tflite"])
    assert isinstance(done.exception, UsageError)


def test_genai_config_runs(demo):
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    folder, _ = demo
    theirs = open_model(str(folder / "packed"), torch.float32)
    ids = theirs.tokenizer("The function returns", return_tensors="pt")["input_ids"]
    model = genai.Model(str(folder / "onnx"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=ids.shape[1] + 32)
    generator = genai.Generator(model, options)
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    found = []
    while not generator.is_done() and len(found) < 32:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == list(make_decoder(theirs.model, "eager").generate(ids, 32))[: len(found)]
    assert list(genai.Tokenizer(model).encode("The function returns")) == ids[0].tolist()


def test_verify_finds_a_changed_weight(demo, tmp_path):
    folder, _ = demo
    broken = tmp_path / "broken"
    shutil.copytree(folder / "onnx", broken)
    data = bytearray((broken / "model.onnx.data").read_bytes())
    start = len(data) // 2
    data[start : start + 20000] = bytes(20000)
    (broken / "model.onnx.data").write_bytes(data)
    with pytest.raises(SourceError, match=r"model\.onnx\.data: does not match its checksum"):
        onnx_verify.verify(broken)
    as_before(broken)
    assert any(not found.is_passed for found in onnx_verify.verify(broken))


def as_before(folder, change=lambda report: None):
    """An export of an earlier version, which had no checksums."""
    report = json.loads((folder / "kbit_export.json").read_text())
    change(report)
    plain = {key: value for key, value in report.items() if key not in ("checksums", "sha256")}
    (folder / "kbit_export.json").write_text(json.dumps(plain))


def test_a_changed_file_is_found(demo, tmp_path):
    """Whichever of them, before anything is run; so is a report that says something else."""
    broken = shutil.copytree(demo[0] / "onnx", tmp_path / "broken")
    names = [path.name for path in broken.iterdir() if path.name != "kbit_export.json"]
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json", "tokenizer.json"} <= {*names}
    for name in names:
        raw = (broken / name).read_bytes()
        (broken / name).write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
        with pytest.raises(SourceError, match=f"{re.escape(name)}: does not match its checksum"):
            OnnxModel(broken)
        (broken / name).write_bytes(raw)
    OnnxModel(broken)
    report = json.loads((broken / "kbit_export.json").read_text())
    for change in ({"parameters": 7}, {"checksums": {}}, {"weights": {}}, {"sha256": None}, {"files": {}}):
        (broken / "kbit_export.json").write_text(json.dumps(report | change))
        with pytest.raises(SourceError, match=r"kbit_export\.json: does not match its checksum"):
            OnnxModel(broken)
    for change in (
        {"weights": 3},
        {"files": [1]},
        {"kind": None},
        {"parameters": 0},
        {"left_alone": {"a": 1}},
    ):
        (broken / "kbit_export.json").write_text(json.dumps(report | change))
        with pytest.raises(SourceError, match=r"kbit_export\.json: damaged"):
            OnnxModel(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx.data", "additional_chat_templates/x.jinja"])
@pytest.mark.parametrize("is_verified", [True, False])
def test_a_pipe_is_not_waited_for(demo, tmp_path, impatient, monkeypatch, name, is_verified):
    broken = shutil.copytree(demo[0] / "onnx", tmp_path / "broken")
    (broken / name).unlink(missing_ok=True)
    (broken / name).parent.mkdir(exist_ok=True)
    os.mkfifo(broken / name)
    monkeypatch.setenv("KBITC_VERIFY", "on" if is_verified else "off")
    with pytest.raises(SourceError, match=f"'{re.escape(name)}' is a pipe"):
        open_model(str(broken))


@pytest.mark.parametrize("name", ["a" * 5000, "x\0", "circle"])
def test_a_file_that_can_have_no_name(demo, tmp_path, name):
    broken = shutil.copytree(demo[0] / "onnx", tmp_path / "broken")
    (broken / "circle").symlink_to("circle")
    as_before(broken, lambda report: report["files"].update({name: 1}))
    with pytest.raises(SourceError, match="cannot be read"):
        OnnxModel(broken)
    with pytest.raises(SourceError, match="is not there; name the artifact"):
        onnx_verify.verify(demo[0] / "onnx", against=name)


def test_verify_finds_a_dense_weight(demo, tmp_path):
    folder, _ = demo
    broken = tmp_path / "broken"
    shutil.copytree(folder / "onnx", broken)
    as_before(broken, lambda report: report["weights"].pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(SourceError, match=r"up_proj\.weight.* expanded"):
        onnx_verify.verify(broken)


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(45, 33)
        self.second = nn.Linear(33, 20, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_plain_module(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 45)
    model = kbitc.compile(TwoUses(), spec="int6:16", example_inputs=(x,))
    export_onnx(model, tmp_path / "out", example_inputs=(x,))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    more = torch.randn(5, 45)
    found = session.run(None, {"input_0": more.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(more), rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match="example_inputs"):
        export_onnx(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_refusals_leave_nothing_behind(demo, tmp_path):
    folder, _ = demo
    with pytest.raises(UsageError, match="compact"):
        kbitc.export_onnx(folder / "packed", tmp_path / "x", storage="compakt")
    with pytest.raises(UsageError, match="split"):
        kbitc.export_onnx(folder / "packed", tmp_path / "x", activations="splitt")
    with pytest.raises(UsageError, match="exists already"):
        kbitc.export_onnx(folder / "packed", folder / "onnx")
    with pytest.raises(SourceError, match="not a compiled model"):
        kbitc.export_onnx(tmp_path, tmp_path / "x")
    with pytest.raises(UsageError, match="nothing in this model is packed"):
        export_onnx(TwoUses().eval(), tmp_path / "x", example_inputs=(torch.ones(1, 45),))
    with pytest.raises(UsageError, match="exported model does not run on the backend 'cpu'"):
        make_decoder(open_model(str(folder / "onnx")).model, "cpu")
    assert list(tmp_path.iterdir()) == []


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(32, 32)

    def forward(self, x):
        return torch.linalg.svd(self.weight(x))[1]


def test_an_operation_without_onnx_form_is_named(tmp_path):
    x = torch.randn(4, 32)
    model = kbitc.compile(Sorts(), spec="int4:32", example_inputs=(x,))
    with pytest.raises(SourceError, match="svd"):
        export_onnx(model, tmp_path / "x", example_inputs=(x,))
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [name for name in sys.modules if name.startswith("kbitc.backends") and "onnx" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(errors.BackendUnavailable, match=r"onnx_export.*onnx_ir"):
        find_backend("onnx_export")
