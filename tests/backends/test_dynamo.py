"""torch.compile with the backend "kbit": the numbers and the plan of kbitc.compile, in Dynamo's graphs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import kbitc
from kbitc.backends import find_backend, make_decoder
from kbitc.backends.dynamo.backend import Dynamo, kbit, models_of
from kbitc.backends.dynamo.options import CompileOptions
from kbitc.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
SPEC = {"spec": "nf4:32", "inner": "eager"}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A norm and two linears; 70 features, which no block divides."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(70), nn.Linear(70, 36), nn.Linear(36, 70, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


class Broken(Block):
    """The same with a graph break in the middle."""

    def forward(self, x):
        hidden = torch.relu(self.up(self.norm(x)))
        torch._dynamo.graph_break()
        return self.down(hidden)


class Tied(nn.Module):
    """Ids to logits, through one matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(101, 70), Block(), nn.Linear(70, 101, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def block(kind=Block):
    torch.manual_seed(0)
    return kind().eval()


X = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))


def packed_block(spec="nf4:32"):
    return kbitc.compile(block(), spec=spec, example_inputs=(X,))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@torch.no_grad()
def test_a_budget_counts_over_the_whole_model():
    """Also where the graph that is compiled first is a part of it: the plan of kbitc.compile."""
    model = block(Broken)
    wanted = kbitc.compile(block(), bits=5.5, example_inputs=(X,))
    options = {"bits": 5.5, "example_inputs": (X,), "inner": "eager"}
    assert error(torch.compile(model, backend=kbit, options=options)(X), wanted(X)) <= 1e-6
    (kept,) = models_of(model)
    packed = {name: p.spec for name, p in wanted.named_parameters() if isinstance(p, kbitc.KbitTensor)}
    assert {name: kept.program.plan.weights[name].spec for name in kept.packed_names} == packed
    assert len(set(packed.values())) > 1


@torch.no_grad()
def test_inductor_makes_the_code():
    compiled, packed = torch.compile(block(), backend=kbit, options={"spec": "nf4:32"}), packed_block()
    for rows in (1, 2, 3, 64):
        x = X[:1].repeat(rows, 1) * torch.arange(1, rows + 1)[:, None]
        assert error(compiled(x), packed(x)) <= 1e-5
    assert graphs() <= 2


def stored_bytes(tensors):
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@torch.no_grad()
def test_freed_weights():
    """Resident: what is packed and the 16-bit rest; a tied weight is packed once."""
    model, ids = block(Tied).bfloat16(), torch.arange(9)[None]
    wanted = kbitc.compile(model, spec="nf4:32", example_inputs=(ids,))
    before = stored_bytes(model.parameters())
    options = {**SPEC, "free_source": True}
    compiled = torch.compile(model, backend=kbit, options=options, fullgraph=True)
    for length in (9, 4, 7, 1):
        assert error(compiled(ids[:, :length]), wanted(ids[:, :length])) <= 1e-3
    assert graphs() == 3  # a length, any length, one token
    (kept,) = models_of(model)
    assert kept.packed_names == ["embed.weight", "body.up.weight", "body.down.weight"]
    resident = stored_bytes([*model.parameters(), *kept.operands.values()])
    packed = {id(p): p for p in wanted.parameters() if isinstance(p, kbitc.KbitTensor)}
    rest = sum(p.nbytes for p in wanted.parameters() if id(p) not in packed)
    tensors = {t.data_ptr(): t.nbytes for p in packed.values() for t in p.packed.tensors().values()}
    assert resident <= 1.05 * (sum(tensors.values()) + rest)
    assert resident < 0.45 * before
    with pytest.raises(RuntimeError, match="storage"):
        model(ids)
    for use in (
        model.state_dict,
        lambda: copy.deepcopy(model),
        lambda: kbitc.compile(model, spec="int4:32", example_inputs=(ids,)),
    ):
        with pytest.raises(UsageError, match="freed"):
            use()
    torch._dynamo.reset()
    again = torch.compile(model, backend=kbit, options=SPEC)  # the same request: packed already
    assert error(again(ids), wanted(ids)) <= 1e-3
    with pytest.raises(Exception, match="was freed"):
        torch.compile(model, backend=kbit, options={"spec": "nf4:64", "inner": "eager"})(ids)
    model.train()
    with torch.enable_grad(), pytest.raises(Exception, match="weights were freed"):
        torch.compile(model, backend=kbit, options=SPEC)(ids)


@torch.no_grad()
def test_a_request_frees_nothing_that_another_reads():
    model = block()
    part = {"weights": {"up.weight": "fp16", "down.weight": "int4:32"}}
    first = torch.compile(model, backend=kbit, options={"plan": part, "inner": "eager"})
    wanted = first(X)
    second = torch.compile(model, backend=kbit, options={**SPEC, "free_source": True})
    assert error(second(X), packed_block()(X)) <= 1e-6
    assert model.down.weight.untyped_storage().nbytes() == 0
    assert model.up.weight.untyped_storage().nbytes() > 0
    assert torch.equal(first(X), wanted)


def test_parts_of_a_model_read_one_plan():
    """Graph breaks, a bound method, a function around the model and a module around it."""
    wanted = packed_block()(X)
    options = {**SPEC, "example_inputs": (X,)}
    broken = block(Broken)
    assert error(torch.compile(broken, backend=kbit, options=options)(X), wanted) <= 1e-6
    assert graphs() == 2
    assert len(models_of(broken)) == 1
    plain = block()
    assert error(torch.compile(plain.forward, backend=kbit, options=SPEC)(X), wanted) <= 1e-6
    assert error(torch.compile(lambda x: plain(x) * 2, backend=kbit, options=SPEC)(X), 2 * wanted) <= 1e-6

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = torch.compile(block(), backend=kbit, options=SPEC), nn.Linear(70, 2)

        def forward(self, x):
            return self.inner(x)

    outer = Outer().eval()
    assert error(outer(X), wanted) <= 1e-6
    assert not models_of(outer)


def test_what_a_graph_does_not_show_is_told():
    """Without example inputs the first of two graphs makes the plan."""
    compiled = torch.compile(block(Broken), backend=kbit, options=SPEC)
    with pytest.warns(RuntimeWarning, match=r"'down.weight' \(never read .* 'example_inputs'\)") as told:
        got = compiled(X)
    compiled(X[:2])
    assert sum("never read" in str(warning.message) for warning in told) == 1
    mixed = block()
    mixed.up.weight = nn.Parameter(packed_block().up.weight.dequantize())
    assert error(got, mixed(X)) <= 1e-3


def test_a_weight_that_no_packed_call_reads_is_dequantized():
    class Scaled(Block):
        def forward(self, x):
            shown = self.down.weight.sum() if x.shape[0] == 3 else 0
            return super().forward(x) + shown

    options = {**SPEC, "example_inputs": (X[:2],)}
    model = block(Scaled)
    packed = packed_block()
    with pytest.warns(RuntimeWarning, match=r"'down.weight' \(dequantized in each call: read by aten.sum"):
        got = torch.compile(model, backend=kbit, options=options)(X)
    assert error(got, packed(X) + packed.down.weight.dequantize().sum()) <= 1e-6


def test_a_graph_that_cannot_be_rewritten_stays_as_it_is():
    class Checkpointed(Block):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = block(Checkpointed)
    with pytest.warns(RuntimeWarning, match="Checkpointed stays unquantized: it cannot be traced"):
        got = torch.compile(model, backend=kbit, options=SPEC)(X)
    assert error(got, model(X)) <= 1e-6


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_sizes_that_depend_on_data():
    class Cut(Block):
        def forward(self, x):
            count = x[0, 0].mul(0).add(2).int().item()
            return super().forward(x[:count])

    got = torch.compile(block(Cut), backend=kbit, options={**SPEC, "inner": "aot_eager"}, fullgraph=True)(X)
    assert error(got, packed_block()(X)[:2]) <= 1e-5


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_transforms_of_functions(inner):
    """`torch.vmap`, one in another, with constants inside, beside linears that stay packed."""

    class Mapped(Block):
        def forward(self, x):
            inner = torch.vmap(lambda a, b: a * b + torch.tensor(0.5), in_dims=(None, 0))
            pair = torch.vmap(inner, in_dims=(None, 0))
            by_row = torch.vmap(lambda row: self.down(torch.relu(row)).sum() + row, randomness="error")
            return super().forward(x) + by_row(self.up(x)).sum() + pair(x[0], torch.stack([x, x]))[1]

    model = block(Mapped)
    wanted = kbitc.compile(block(Mapped), spec="nf4:32", example_inputs=(X,))(X)
    got = torch.compile(model, backend=kbit, options={**SPEC, "inner": inner}, fullgraph=True)(X)
    assert error(got, wanted) <= 1e-3
    assert error(model(X), wanted) > 1e-2


OTHERS = {
    "torch.func.grad or vjp": lambda x: torch.func.grad(lambda v: v.sin().sum())(x),
    "torch.func.grad or vjp, after its region": lambda x: torch.func.vjp(torch.sin, x)[1](x)[0],
    "torch.func.jvp": lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
}


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_transforms_are_left_to_torch(name, has_gradients):
    """Traced without gradients they would come out as zeros, or as tensors without data."""

    class Other(Block):
        def forward(self, x):
            return super().forward(x) + OTHERS[name](x)

    model = block(Other)
    with torch.set_grad_enabled(has_gradients):
        with pytest.warns(RuntimeWarning, match=f"unquantized: it calls {name.partition(',')[0]}, of which"):
            got = torch.compile(model, backend=kbit, options=SPEC, fullgraph=True)(X)
        assert error(got, model(X)) <= 1e-6


def test_a_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(36, 70), nn.Linear(36, 5)).eval()
    wanted = kbitc.compile(model, spec="int4:50+zp", example_inputs=(X,))(X)
    assert (
        error(torch.compile(model, backend=kbit, options={**SPEC, "spec": "int4:50+zp"})(X), wanted) <= 1e-6
    )
    assert error(model(X), wanted) > 1e-2


def test_training_is_left_as_it_is():
    model = block().train()
    compiled = torch.compile(model, backend=kbit, options=SPEC)
    with pytest.warns(RuntimeWarning, match="training mode with gradients"):
        got = compiled(X)
    got.sum().backward()
    assert model.up.weight.grad is not None
    assert torch.equal(got, model(X))
    with torch.no_grad():
        assert error(compiled(X), packed_block()(X)) <= 1e-6


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_of_inputs(inner):
    compiled = torch.compile(block(), backend=kbit, options={**SPEC, "inner": inner})
    assert not compiled(X).requires_grad  # parameters are constants
    given, same = X.clone().requires_grad_(), X.clone().requires_grad_()
    compiled(given).square().sum().backward()
    packed_block()(same).square().sum().backward()
    assert error(given.grad, same.grad) <= 1e-5


def test_planned_and_run_in_inference_mode_and_autocast():
    """Packed tensors are plain ones, whatever the first call was made in."""
    compiled = torch.compile(block(), backend=kbit, options=SPEC)
    wanted = packed_block()(X)
    with torch.inference_mode():
        assert error(compiled(X), wanted) <= 1e-6
    assert error(compiled(X), wanted) <= 1e-6
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        model = block()
        got, wanted = torch.compile(model, backend=kbit, options=SPEC)(X), packed_block()(X)
    assert got.dtype == wanted.dtype
    assert error(got, wanted) <= 1e-6
    double = torch.compile(model.double(), backend=kbit, options=SPEC)(X.double())
    assert double.dtype == torch.float64  # moved: packed anew


def test_what_it_refuses():
    for options, message in (
        ({"bit": 4}, "did you mean 'bits'"),
        ({"inner": "inducter"}, "did you mean 'inductor'"),
        ({"bits": 4, "spec": "nf4:64"}, "exactly one of"),
        ({"calibrate": "none", "calibration": "none"}, "are one option"),
        ({"spec": "nf4:64", "plan": "plan.json"}, "exactly one of"),
    ):
        with pytest.raises(UsageError, match=message):
            CompileOptions.of(options)
        with pytest.raises(Exception, match=message):  # torch wraps it
            torch.compile(block(), backend=kbit, options=options)(X)
    assert CompileOptions.of({"calibration": "none"}).calibrate == "none"
    assert CompileOptions.of({}).request().bits == 4
    two = [block(), block()]
    with pytest.warns(
        RuntimeWarning, match="a function stays unquantized: its parameters are not of one module"
    ):
        torch.compile(lambda x: two[0](x) + two[1](x), backend=kbit, options=SPEC)(X)
    assert find_backend("dynamo") is Dynamo
    assert Dynamo().missing() is None
    with pytest.raises(UsageError, match="does not decode"):
        make_decoder(block(), "dynamo")


def test_the_example_finds_it_by_name(tmp_path):
    """Through the entry point that pyproject declares, whatever an older installation says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["torch_dynamo_backends"]
    info = tmp_path / "kbitc-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kbitc\nVersion: 0.0.0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{lines}")
    example = ROOT / "examples" / "torch_compile.py"
    assert "import kbitc" not in example.read_text()
    options = json.dumps({"spec": "nf4:64", "inner": "eager"})
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, example, ROOT / "kbitc" / "demo_model", options], capture_output=True, text=True,
        check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Python is a programming language that" in done.stdout
    assert re.search(r"16-bit weights left: 0\.0\d MB of \d", done.stdout)
