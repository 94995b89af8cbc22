"""Weights that are read through views, in every form that is matched: as a graph, measured, packed and run.

What the matcher accepts has to run on packed weights: `FORMS` holds at least one form for each call that it
knows (`test_every_call_that_is_matched_stands_here`).
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kbitc
from kbitc.errors import UsageError
from kbitc.graph import contraction, matching
from kbitc.graph.capture import capture
from kbitc.graph.weight_reads import op_name
from kbitc.sensitivity.streaming import TURNED, Streamed
from kbitc.tensor import KbitTensor
from kbitc.tensor.layers import CELLS


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5, requires_grad=False)


class Form(nn.Module):
    """``function(x, w, v, ...)`` with parameters of given shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        for name, shape in zip("wvu", shapes, strict=False):
            self.register_parameter(name, parameter(*shape))

    def forward(self, *inputs):
        return self.function(*inputs, *self.parameters())


X = torch.randn(2, 5, 32)
IDS = torch.tensor([[1, 2, 9]])
OFFSETS = torch.tensor([4, 4, 10], dtype=torch.int32)


def experts_of_counted_rows(x, w):
    """As many rows for each as the data says."""
    counts = (x[:, 0] > 0).long().sum().repeat(2) * torch.tensor([1, -1]) + torch.tensor([0, len(x)])
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, w[i]) for i, part in enumerate(parts)])


def relative_positions(x, w):
    """SAM's: a table fitted to another size, of which each pair of places reads a row."""
    table = F.interpolate(w[None].mT, size=x.shape[1] * 2 - 1, mode="linear")[0].mT
    places = torch.arange(x.shape[1])
    return torch.einsum("bqc,qkc->bqk", x, table[places[:, None] - places + x.shape[1] - 1])


def distances_to_codebook(x, w):
    """Of DAC, by rows of length one."""
    rows = F.normalize(w)
    return x @ rows.t() - rows.pow(2).sum(1)


FORMS = {
    "linear": (F.linear, X, (16, 32)),
    "linear with a bias": (F.linear, X, (16, 32), (16,)),
    "mm": (torch.mm, X[0], (32, 16)),
    "matmul": (torch.matmul, X, (32, 16)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), X[0], (32, 16), (16,)),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), X[0], (32, 16), (16,)),
    "bmm": (torch.bmm, X, (2, 32, 16)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w), X, (2, 32, 16), (2, 1, 16)),
    "baddbmm, scaled": (
        lambda x, w, b: torch.baddbmm(b, x, w, beta=0.5, alpha=2),
        X,
        (2, 32, 16),
        (2, 1, 16),
    ),
    "embedding": (lambda ids, w: F.embedding(ids, w), IDS, (10, 8)),
    "grouped_mm": (
        lambda x, w: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=OFFSETS).float(),
        X.flatten(0, 1),
        (3, 32, 16),
    ),
    "inner": (torch.inner, X, (16, 32)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([2], [1])), X, (16, 32)),
    "tensordot over two": (lambda x, w: torch.tensordot(x, w, 2), X, (5, 32, 7)),
    "mv": (lambda x, w: torch.mv(w, x[0, 0]), X, (16, 32)),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x[0, 0]), X, (16, 32), (16,)),
    "a vector": (torch.matmul, X, (32,)),
    "on the left": (lambda x, w: w @ x, X, (7, 5)),
    "on the left, cut": (lambda x, w: w[:3] @ x, X, (7, 5)),
    "heads out": (lambda x, w: torch.einsum("bth,hnd->btnd", x, w), X, (32, 4, 8)),
    "heads in": (lambda x, w: torch.einsum("bthk,hkd->btd", x.unflatten(-1, (4, 8)), w), X, (4, 8, 16)),
    "groups": (lambda x, w: torch.einsum("btgi,gio->btgo", x.unflatten(-1, (4, 8)), w), X, (4, 8, 16)),
    "groups, turned": (
        lambda x, w: torch.einsum("btgi,goi->bgto", x.unflatten(-1, (4, 8)), w),
        X,
        (4, 16, 8),
    ),
    "moved": (lambda x, w: torch.einsum("...i,oi->o...", x, w), X, (16, 32)),
    "implicit": (lambda x, w: torch.einsum("bti,io", x, w), X, (32, 16)),
    "rows": (lambda x, w, b: F.linear(x, w[:5], b[:5]), X, (16, 32), (16,)),
    "one row": (lambda x, w: F.linear(x, w[3:4]), X, (16, 32)),
    "columns": (lambda x, w: F.linear(x, w[:, 4:36]), X, (16, 40)),
    "chunks": (lambda x, w: [F.linear(x, part) for part in w.chunk(3)], X, (48, 32)),
    "chunks, turned": (lambda x, w: [x @ part for part in w.chunk(3, dim=1)], X, (32, 48)),
    "heads of a matrix": (lambda x, w: x[:, None] @ w.view(4, 8, 32).mT, X, (32, 32)),
    "groups of a matrix": (
        lambda x, w: x.view(10, 4, 8).transpose(0, 1) @ w.view(4, 8, 8),
        X,
        (32, 8),
    ),
    "experts one by one": (lambda x, w: x @ w[1] + x @ w[2], X, (3, 32, 16)),
    "experts unbound": (lambda x, w: sum(F.linear(x, part) for part in w.unbind()), X, (3, 16, 32)),
    "experts of counted rows": (experts_of_counted_rows, X[0], (2, 16, 32)),
    "expanded": (lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(2, -1, -1)), X, (32, 16)),
    "cast": (lambda x, w: F.linear(x.double(), w.to(torch.float64)).float(), X, (16, 32)),
    "times a number": (lambda x, w: F.linear(x, w * 0.25), X, (16, 32)),
    "times rows": (lambda x, w, g: F.linear(x, w * g[:, None]), X, (16, 32), (16,)),
    "over columns": (lambda x, w, g: x @ (w / (g[:, None] + 9))[:, 2:], X, (32, 16), (32,)),
    "tied to its transpose": (lambda x, w: F.linear(F.linear(x, w).relu(), w.T), X, (16, 32)),
    "one row beside others": (lambda ids, w: F.embedding(ids, w).tanh() + w[-2, :], IDS, (10, 8)),
    "a concatenation": (lambda x, w, v: F.linear(x, torch.cat([w, v])), X, (16, 32), (16, 32)),
    "picked rows": (lambda x, w: F.linear(x, w[torch.tensor([3, 1])]), X, (16, 32)),
    "relative positions": (relative_positions, X, (9, 32)),
    "distances to a codebook": (distances_to_codebook, X, (12, 32)),
    "soft look-up": (lambda ids, w: (F.embedding(ids, w) @ w.T).softmax(-1) @ w, IDS, (10, 8)),
}
MODULES = {
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)), X),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(32, 16)), X),
    "weight norm of columns": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 16), dim=1), X),
    "weight norm of a convolution": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(5, 16, 1)), X),
    "conv1d": (lambda: nn.Conv1d(5, 8, 1), X),
    "conv2d": (lambda: nn.Conv2d(3, 8, 4, stride=4), torch.randn(2, 3, 17, 16)),
    "strided conv2d": (lambda: nn.Conv2d(3, 8, 1, stride=2, bias=False), torch.randn(2, 3, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2)), torch.randn(3, 3, 4, 4)),
    "lstm": (lambda: nn.LSTM(32, 12, 2, bidirectional=True, batch_first=True), X),
    "projected lstm": (lambda: nn.LSTM(32, 12, proj_size=5), X),
    "gru": (lambda: nn.GRU(32, 12), X),
    "rnn_tanh": (lambda: nn.RNN(32, 12, bias=False), X),
    "rnn_relu": (lambda: nn.RNN(32, 12, nonlinearity="relu"), X),
    "lstm_cell": (lambda: nn.LSTMCell(32, 12), X[0]),
    "gru_cell": (lambda: nn.GRUCell(32, 12), X[0]),
    "rnn_tanh_cell": (lambda: nn.RNNCell(32, 12), X[0]),
    "rnn_relu_cell": (lambda: nn.RNNCell(32, 12, nonlinearity="relu"), X[0]),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 24, batch_first=True), X),
}


def made(name):
    torch.manual_seed(0)
    if name in FORMS:
        function, x, *shapes = FORMS[name]
        return Form(function, *shapes).eval(), x
    make, x = MODULES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm, the old one
        return make().eval().requires_grad_(requires_grad=False), x


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", [*FORMS, *MODULES])
def test_packed_it_runs_as_the_dequantized_model(name):
    model, x = made(name)
    packed = kbitc.compile(model, spec="int6:8", example_inputs=(x,), strict=True)
    weights = {key: value for key, value in packed.named_parameters() if isinstance(value, KbitTensor)}
    assert weights
    with torch.no_grad():
        got = leaves(packed(x))
        for key, weight in weights.items():
            model.get_parameter(key).copy_(weight.dequantize())
        wanted = leaves(model(x))
    tolerance = 2e-2 if "grouped" in name else 1e-4  # bfloat16 there
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [*FORMS, *MODULES])
def test_the_graph_computes_the_same_and_shows_inputs_of_the_whole_matrix(name, canonicalize):
    model, x = made(name)
    program = canonicalize(model, (x,))
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    seen = []

    def watch(key, kind, given, out):
        weight = program.weights[key]
        features = (weight.in_features, weight.rows // (weight.matrix[0] if len(weight.matrix) == 3 else 1))
        if kind.startswith(TURNED):
            features = features[::-1]
        values = given[0] if "grouped" in kind else given
        if kind != "embedding":
            assert (values.shape[-1], out.shape[-1]) == features
        seen.append(key)

    (given,) = [
        node.target
        for node in program.graph.graph.nodes
        if node.op == "placeholder" and node.name not in program.parameters
    ]
    with torch.no_grad():
        outputs = Streamed(program, lambda key: state[key].detach(), watch).call(**{given: x})
        wanted = leaves(model(x))
    assert set(seen) == set(program.weights)
    tolerance = 2e-2 if "grouped" in name else 1e-4
    for one, other in zip(leaves(outputs), wanted, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, atol=tolerance, rtol=tolerance)


def test_every_call_that_is_matched_stands_here():
    called = set()
    for name in (*FORMS, *MODULES):
        model, x = made(name)
        nodes = capture(model, (x,)).graph.graph.nodes
        called |= {op_name(node) for node in nodes if node.op == "call_function"}
    # transformers' own grouped matmul is in the tests of its models; conv1d is "aten.conv1d" here.
    known = {*matching._MATCHERS, *contraction._PRODUCTS} - {"transformers.grouped_mm_fallback"}
    layers = {f"aten.{kind}{end}" for kind in CELLS for end in ("", "_cell")}
    layers |= {
        "aten.conv1d",
        "aten.conv2d",
        "aten.conv3d",
        "aten.inner",
        "aten.tensordot",
        "aten.mv",
        "aten.addmv",
    }
    assert known | layers <= called


@pytest.mark.parametrize(
    "name", ["heads out", "heads in", "groups of a matrix", "conv2d", "lstm", "weight norm"]
)
def test_an_artifact_holds_it(name, tmp_path):
    model, x = made(name)
    packed = kbitc.compile(model, spec="int6:8", example_inputs=(x,), out=tmp_path / "one")
    kbitc.save(packed, tmp_path / "two")
    with torch.no_grad():
        wanted = leaves(packed(x))
    for folder in ("one", "two"):
        loaded = kbitc.load_into(copy.deepcopy(model), tmp_path / folder).float()
        with torch.no_grad():
            for got, other in zip(leaves(loaded(x)), wanted, strict=True):
                torch.testing.assert_close(got, other, atol=5e-3, rtol=5e-3)  # biases are stored at 16 bits
        shapes = {key: value.shape for key, value in loaded.named_parameters()}
        assert shapes == {key: value.shape for key, value in model.named_parameters()}


UNPACKED = {
    "a sum": (lambda x, w, v: F.linear(x, w + v), X, (16, 32), (16, 32)),
    "a product": (lambda x, w, v: F.linear(x, w * v), X, (16, 32), (16, 32)),
    "a softmax": (lambda x, w: x @ w.softmax(0), X, (32, 16)),
    "of low rank": (lambda x, w, v: F.linear(x, w @ v), X, (16, 4), (4, 32)),
}


class Beside(nn.Module):
    """A form, and a linear that is packed."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.plain = nn.Linear(32, 4)

    def forward(self, x):
        return self.form(x), self.plain(x)


@pytest.mark.parametrize("name", UNPACKED)
def test_a_weight_that_is_computed_of_parameters_fails_strict_by_name(name):
    function, x, *shapes = UNPACKED[name]
    model = Beside(Form(function, *shapes))
    with pytest.raises(UsageError, match=r"unquantized, the first is form\.w"):
        kbitc.compile(model, spec="int6:8", example_inputs=(x,), strict=True)


def test_queries_that_are_learned_are_no_weights(canonicalize):
    """Perceiver's latents: made of parameters alone, but a product of theirs meets the input, not they."""
    program = canonicalize(Form(lambda x, w, v: F.linear(v, w) @ x.mT, (16, 32), (3, 32)), (X[..., :16],))
    assert list(program.weights) == ["w"]
    assert not program.rest["v"].is_matmul
