"""`KbitTensor` in a model: every function it dispatches, movement, compile and export."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kbitc
from kbitc.quantizers import quantize
from kbitc.tensor.kbit_tensor import KbitTensor


@pytest.fixture
def weight():
    return quantize(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), "nf4:16+dq")


@pytest.fixture
def turned():
    """A Conv1D weight: (in, out), blocks along the first dimension."""
    dense = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    return quantize(dense, "int5:16", is_transposed=True)


@pytest.fixture
def experts():
    return quantize(torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(0)), "int4:16+zp")


def test_it_looks_like_the_dense_weight(weight, turned):
    assert tuple(weight.shape) == (24, 40)
    assert weight.dtype == torch.float32
    assert str(weight.spec) == "nf4:16+dq"
    assert "KbitTensor(nf4:16+dq, shape=(24, 40)" in repr(weight)
    assert tuple(turned.shape) == (40, 24)
    assert torch.equal(turned.dequantize(), turned.T.dequantize().T)
    assert weight.dequantize(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("spec", ["nf4:16", "nf4:16+dq", "int4:16+zp", "int5:8+out10%"])
def test_powers_of_two_scale_it_in_place(spec):
    """As RWKV divides the outputs of later layers before it infers."""
    weight = quantize(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), spec)
    before = weight.dequantize()
    assert weight.div_(2**3) is not None
    assert torch.equal(weight.dequantize(), before / 8)
    weight.mul_(torch.tensor(16.0))
    assert torch.equal(weight.dequantize(), before * 2)
    for refused in (3, 0, -2, 2.0**-170):
        with pytest.raises(NotImplementedError, match="power of two"):
            weight.mul_(refused)
    for refused in (0, 3, torch.full((40,), 2.0)):
        with pytest.raises(NotImplementedError, match="power of two"):
            weight.div_(refused)
    with pytest.raises(NotImplementedError, match="power of two"):
        weight[:7].mul_(2)
    with pytest.raises(NotImplementedError, match="not defined on a packed weight"):
        torch.ones(24, 40).mul_(weight)
    assert torch.equal(weight.dequantize(), before * 2)


def test_blocks_of_a_transposed_weight_run_along_the_input():
    dense = torch.ones(64, 2)
    dense[:, 1] = 100.0
    assert torch.equal(quantize(dense, "int4:64", is_transposed=True).dequantize(), dense)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(x, w, torch.ones(24)),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: x.matmul(w.t()),
        lambda x, w: torch.mm(x, torch.transpose(w, 0, 1)),
        lambda x, w: (w @ x.T).T,
        lambda x, w: torch.stack([w @ row for row in x]),
        lambda x, w: (w @ x.T.expand(2, 40, 5))[1].T,
        lambda x, w: x @ w.permute(1, 0),
        lambda x, w: F.linear(x, w.permute((0, 1)).reshape(24, 40).view((24, 40))),
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: torch.einsum("io,bi->bo", w.T, x),
        lambda x, w: torch.addmm(torch.ones(24), x, w.transpose(0, 1)),
        lambda x, w: torch.addmm(torch.ones(5, 24), x, w.T, beta=2, alpha=3),
        lambda x, w: torch.ones(24).addmm(x, w.T),
        lambda x, w: torch.ops.kbit.linear(x, *w.operands(), None) if isinstance(w, KbitTensor) else x @ w.T,
    ],
)
def test_matmuls_equal_dense(weight, call):
    x = torch.randn(5, 40)
    assert torch.allclose(call(x, weight), call(x, weight.dequantize()), atol=1e-4)


def test_conv1d_equals_dense(turned):
    x = torch.randn(5, 40)
    assert torch.allclose(
        torch.addmm(torch.ones(24), x, turned), torch.ones(24) + x @ turned.dequantize(), atol=1e-4
    )
    assert torch.allclose(x @ turned, x @ turned.dequantize(), atol=1e-4)


def test_embedding_equals_dense(weight):
    ids = torch.tensor([[1, 23], [0, 1]])
    assert torch.equal(F.embedding(ids, weight, padding_idx=0), weight.dequantize()[ids])


def test_experts_equal_dense(experts):
    dense = experts.dequantize()
    x, offsets = torch.randn(5, 40), torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    wanted = torch.stack([x[i] @ dense[e].T for i, e in enumerate([0, 0, 2, 2, 3])])
    assert torch.allclose(F.grouped_mm(x, experts.transpose(-2, -1), offs=offsets), wanted, atol=1e-4)
    assert torch.equal(experts[2].dequantize(), dense[2])
    assert torch.equal(experts[torch.tensor(1)].dequantize(), dense[1])
    assert torch.equal(experts[torch.tensor([3, 3])].dequantize(), dense[[3, 3]])
    columns = torch.randn(4, 40, 3)
    assert torch.allclose(torch.bmm(experts, columns), torch.bmm(dense, columns), atol=1e-4)
    rows = torch.randn(4, 2, 40)
    assert torch.allclose(torch.bmm(rows, experts.mT), torch.bmm(rows, dense.mT), atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w + 1,
        lambda w: w.sum(),
        lambda w: w.to(torch.int32),
        lambda w: w.exp(),
        lambda w: w.view(torch.int32),
        lambda w: F.embedding(torch.tensor([0]), w, max_norm=1.0),
    ],
)
def test_anything_else_is_an_error_not_a_silent_dequantization(weight, call):
    with pytest.raises(NotImplementedError):
        call(weight)


def test_gradient_flows_to_the_input(weight):
    x = torch.randn(2, 40, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(2, 40), atol=1e-4)


def model_of(weight):
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def test_movement(weight):
    model = model_of(weight)
    assert isinstance(model[0].weight, KbitTensor)
    assert model.half()[0].weight.dtype == torch.float16
    assert torch.equal(model[0].weight.packed.planes, weight.packed.planes)
    assert model.to("meta")[0].weight.device.type == "meta"
    other = model_of(weight)
    copied = copy.deepcopy(other)
    assert copied[0].weight.packed.planes.data_ptr() != weight.packed.planes.data_ptr()
    x = torch.randn(2, 40)
    assert torch.equal(copied(x), other(x))
    assert weight.detach().clone().spec == weight.spec


def test_deepcopy_keeps_ties(weight):
    pair = nn.ModuleList([nn.Linear(40, 24), nn.Linear(40, 24)])
    pair[0].weight = pair[1].weight = nn.Parameter(weight, requires_grad=False)
    copied = copy.deepcopy(pair)
    assert copied[0].weight is copied[1].weight


def test_state_dict_round_trips_in_memory(weight):
    model, x = model_of(weight), torch.randn(2, 40)
    state = model.state_dict()
    assert isinstance(state["0.weight"], KbitTensor)
    fresh = model_of(quantize(torch.zeros(24, 40), "nf4:16+dq"))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    fresh = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    state["0.weight"] = nn.Parameter(state["0.weight"], requires_grad=False)
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(x), model(x))


def test_save_and_load_without_pickle(weight, tmp_path):
    model, x = model_of(weight), torch.randn(2, 40)
    kbitc.save(model, tmp_path / "saved")
    assert not [p for p in (tmp_path / "saved").rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    loaded = kbitc.load_into(empty, tmp_path / "saved").float()
    assert torch.equal(loaded[0].weight.packed.planes, weight.packed.planes)
    assert torch.allclose(loaded(x), model(x), atol=2e-3)  # biases were stored at 16 bits


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(weight, backend):
    model, x = model_of(weight), torch.randn(2, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_exports_with_dynamic_shapes(weight):
    model = model_of(weight).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(3, 40),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("kbit.linear.default") == 1
    x = torch.randn(9, 40)
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


def test_compiled_training_step_of_an_adapter(weight):
    """QLoRA's shape: gradients pass through the frozen packed base."""
    base = model_of(weight)
    adapter = nn.Linear(40, 40, bias=False)
    torch._dynamo.reset()
    step = torch.compile(lambda x: base(x + adapter(x)).square().mean(), fullgraph=True, backend="aot_eager")
    step(torch.randn(8, 40)).backward()
    assert adapter.weight.grad.norm() > 0
