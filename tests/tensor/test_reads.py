"""Views of a packed weight and what multiplies by them, against the same calls on the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.quantizers import quantize
from kbitc.tensor import KbitTensor
from kbitc.tensor.geometry import Geometry
from kbitc.tensor.kbit_tensor import packed_as
from kbitc.tensor.reads import part_of

X, Y = torch.randn(5, 40), torch.randn(5, 24)
IMAGE = torch.randn(2, 10, 7, 8)


def table(weight):
    """Positions of 4 by 6 places."""
    return weight.view(4, 6, 40).permute(2, 0, 1).unsqueeze(0)


CALLS = {
    "transposed": lambda w: F.linear(Y, w.T),
    "rows": lambda w: F.linear(X, w[3:9]),
    "columns": lambda w: F.linear(X[:, :10], w[:, 5:15]),
    "rows of the transpose": lambda w: X[:, 2:4] @ w.T[2:4],
    "chunk": lambda w: torch.cat([F.linear(X, part) for part in w.chunk(3)]),
    "split": lambda w: [F.linear(X, part) for part in w.split([4, 20])][1],
    "unbind": lambda w: F.linear(X, w.view(3, 8, 40).unbind()[1]),
    "heads": lambda w: X @ w.view(4, 6, 40).mT,
    "heads, the other way": lambda w: torch.bmm(torch.ones(4, 5, 6), w.view(4, 6, 40)),
    "expanded": lambda w: torch.bmm(X.expand(3, 5, 40), w.T[None].expand(3, 40, 24)),
    "float64": lambda w: F.linear(X.double(), w.to(torch.float64)),
    "times a number": lambda w: F.linear(X, 0.3 * w),
    "times rows": lambda w: F.linear(X, (w * torch.arange(24.0)[:, None])[3:5]),
    "times columns": lambda w: F.linear(X, w * 2 * torch.arange(40.0)),
    "times both": lambda w: F.linear(X, w * torch.arange(24.0)[:, None] * torch.arange(40.0)),
    "divided": lambda w: F.linear(X, -w / 3),
    "weight norm": lambda w: F.linear(X, torch._weight_norm(w, torch.ones(24, 1), 0)),
    "baddbmm": lambda w: torch.baddbmm(Y[:, :6], X.expand(4, 5, 40), w.view(4, 6, 40).mT, beta=2, alpha=3),
    "addbmm": lambda w: torch.addbmm(Y[:, :6], X.expand(4, 5, 40), w.view(4, 6, 40).mT),
    "inner": lambda w: torch.inner(X, w),
    "tensordot": lambda w: torch.tensordot(X, w, ([1], [1])),
    "mv": lambda w: torch.mv(w, X[0]) + torch.addmv(torch.ones(24), w, X[1]),
    "a vector": lambda w: X @ w[3],
    "einsum": lambda w: torch.einsum("bi,hdi->hbd", X, w.view(4, 6, 40)),
    "einsum of groups": lambda w: torch.einsum("bgi,gio->bgo", X.view(5, 4, 10), w.view(4, 10, 24)),
    "conv1d": lambda w: F.conv1d(X.T, w.view(24, 40, 1), torch.ones(24)),
    "patches": lambda w: F.conv2d(IMAGE, w.view(24, 10, 2, 2), torch.ones(24), stride=2).flatten(2),
    "overlapping": lambda w: F.conv1d(IMAGE[0], w.view(24, 8, 5)[:, :7], padding=1),
    "no rows": lambda w: F.linear(X[:0], w[:3]),
    "bilinear": lambda w: F.interpolate(table(w), size=(5, 3), mode="bilinear", antialias=True),
    "bicubic": lambda w: F.interpolate(table(w), size=(5, 3), mode="bicubic"),
    "nearest": lambda w: F.interpolate(table(w), scale_factor=2),
    "sampled": lambda w: F.grid_sample(table(w), Y.tanh()[:, :2].view(1, 5, 1, 2), align_corners=False),
}


@pytest.fixture(scope="module", params=["nf4:16+dq", "int5:16+zp"])
def weight(request):
    return quantize(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), request.param)


@pytest.mark.parametrize("name", CALLS)
def test_a_view_is_read_as_the_dequantized_weight(name, weight):
    wanted = CALLS[name](weight.dequantize())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(CALLS[name](weight), wanted, atol=4e-4, rtol=4e-4)


@pytest.mark.parametrize(
    "name", ["transposed", "rows", "columns", "chunk", "heads", "times rows", "weight norm"]
)
def test_gradients_of_inputs_pass_through_views(name, weight, monkeypatch):
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    monkeypatch.setitem(globals(), "X", x)
    monkeypatch.setitem(globals(), "Y", y)
    grads = []
    for value in (weight, weight.dequantize()):
        leaf = y if name == "transposed" else x
        (grad,) = torch.autograd.grad(CALLS[name](value).square().sum(), leaf)
        grads.append(grad)
    torch.testing.assert_close(*grads, atol=1e-2, rtol=1e-3)


def test_rows_are_read_where_they_lie_and_nothing_is_dequantized(monkeypatch):
    weight = quantize(torch.randn(24, 40), "int4:8")
    part = part_of(weight.packed, weight[3:9].T.placement())
    assert part is not None
    assert part.packed.planes.data_ptr() == weight.packed.planes[3:].data_ptr()
    assert (part.first, part.last, part.is_turned) == (0, 40, True)
    monkeypatch.setattr(KbitTensor, "dequantize", lambda *_: pytest.fail("dequantized"))
    for name in ("transposed", "rows", "columns", "heads", "times rows", "patches", "heads, the other way"):
        CALLS[name](weight)


@pytest.mark.parametrize("shape", [(24, 10, 2, 2), (4, 6, 40), (24, 40)])
def test_a_parameter_of_another_shape(shape):
    dense = torch.randn(24, 40)
    packed = quantize(dense, "int6:8")
    kernel = packed_as(packed.packed, torch.float32, shape, is_transposed=False)
    assert tuple(kernel.shape) == shape
    assert torch.equal(kernel.dequantize(), packed.dequantize().view(shape))
    assert kernel.view_of() == (None if shape == (24, 40) else (24, 40))
    copied = copy.deepcopy(nn.Parameter(kernel, requires_grad=False))
    assert torch.equal(copied.half().dequantize(), packed.dequantize().half().view(shape))
    assert torch.equal(kernel.detach().clone().dequantize(), kernel.dequantize())


def test_a_shape_that_is_no_view_of_the_packed_matrix_is_refused():
    packed = quantize(torch.randn(8, 24), "int6:8", is_transposed=True).packed
    with pytest.raises(ValueError, match="cannot be seen as"):
        packed_as(packed, torch.float32, (2, 96), is_transposed=True)


def test_geometry_of_a_copy_is_none():
    turned = Geometry.of_matrix((2, 3), is_transposed=True)
    assert turned.reshaped((6,)) is None
    assert Geometry.row_major((2, 3)).reshaped((6,)) == Geometry((6,), (1,))


def _packed(module):
    """A copy with packed matrices, and the module itself with what they hold."""
    packed = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            weight = quantize(parameter.detach(), "int6:4")
            parameter.data.copy_(weight.dequantize())
            path, _, leaf = name.rpartition(".")
            setattr(packed.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    return packed


SEQUENCE = torch.randn(7, 3, 16)
LAYERS = {
    "lstm": (lambda: nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True), SEQUENCE),
    "projected lstm": (lambda: nn.LSTM(16, 12, proj_size=5), SEQUENCE),
    "gru": (lambda: nn.GRU(16, 12, 2, bias=False), SEQUENCE),
    "gru, no batch": (lambda: nn.GRU(16, 12), SEQUENCE[:, 0]),
    "rnn": (lambda: nn.RNN(16, 12, nonlinearity="relu", bidirectional=True), SEQUENCE),
    "tanh": (lambda: nn.RNN(16, 12), SEQUENCE),
    "lengths": (
        lambda: nn.LSTM(16, 12, 2, bidirectional=True),
        nn.utils.rnn.pack_padded_sequence(SEQUENCE, [7, 4, 2]),
    ),
    "lstm cell": (lambda: nn.LSTMCell(16, 12), SEQUENCE[0]),
    "gru cell": (lambda: nn.GRUCell(16, 12, bias=False), SEQUENCE[0]),
    "rnn cell": (lambda: nn.RNNCell(16, 12), SEQUENCE[0]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers(name):
    make, x = LAYERS[name]
    dense = make().eval()
    packed = _packed(dense)
    with torch.no_grad():
        got, wanted = (torch.utils._pytree.tree_leaves(module(x)) for module in (packed, dense))
    tensors = [value for value in wanted if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert tensors
    for one, other in zip(got, wanted, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 24}, {"add_zero_attn": True, "bias": False}])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_multihead_attention(options, needs_weights):
    dense = nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    packed = _packed(dense)
    query = torch.randn(2, 5, 32)
    key, value = torch.randn(2, 3, options.get("kdim", 32)), torch.randn(2, 3, options.get("vdim", 32))
    mask = torch.tensor([[False, False, True], [False, True, True]])
    with torch.no_grad():
        got, wanted = (
            m(query, key, value, key_padding_mask=mask, need_weights=needs_weights) for m in (packed, dense)
        )
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        if not options:
            torch.testing.assert_close(packed(query, query, query)[0], dense(query, query, query)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_transformer_encoder_takes_no_fast_path_that_reads_plain_weights(mode):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).eval()
    packed, x = _packed(dense), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with mode():
        torch.testing.assert_close(packed(x), dense(x), atol=1e-5, rtol=1e-5)
        got, wanted = (m(x, src_key_padding_mask=padding)[~padding] for m in (packed, dense))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_views_compile_without_graph_breaks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(quantize(torch.randn(24, 40), "int6:8"), requires_grad=False)

        def forward(self, x):
            first, second = self.w.chunk(2)
            return F.linear(x, first) + F.linear(x, second * 0.5)

    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


def test_sums_and_products_into_dense_tensors():
    """As PEFT's DoRA and TRL's chunked losses write them."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(24, 40, generator=generator), "int4:8")
    x, like = torch.randn(5, 40, generator=generator), torch.randn(24, 40, generator=generator)
    dense = weight.dequantize()
    assert torch.equal(weight + 0.5 * like, dense + 0.5 * like)
    assert torch.equal(like + weight, like + dense)
    tile = torch.empty(5, 8)
    assert torch.mm(x, weight[3:11].t(), out=tile) is tile
    assert torch.allclose(tile, x @ dense[3:11].t(), atol=1e-3)
    total = torch.ones(5, 40)
    total.addmm_(tile, weight[3:11])
    assert torch.allclose(total, 1 + tile @ dense[3:11], atol=1e-3)
    experts = quantize(torch.randn(3, 24, 40, generator=generator), "int4:8")
    left, right = torch.randn(3, 24, 4, generator=generator), torch.randn(3, 4, 40, generator=generator)
    added = torch.baddbmm(experts, left, right, alpha=2)
    assert torch.allclose(added, experts.dequantize() + 2 * left @ right, atol=1e-5)
    with pytest.raises(NotImplementedError, match="packed weight"):
        weight.addmm_(torch.randn(24, 3), torch.randn(3, 40))
    with pytest.raises(NotImplementedError, match="frozen"):
        torch.mm(x, like.t(), out=weight[:5])
