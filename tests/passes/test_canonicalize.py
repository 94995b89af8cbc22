"""The pass `canonicalize` on plain modules: each form becomes one call, each near miss stays and says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.capture import capture
from kbitc.graph.program import Stage
from kbitc.graph.weight_reads import op_name
from kbitc.passes.canonicalize import Canonicalize


class Product(nn.Module):
    """``function(x, weight)`` with parameters of given shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, shape in zip("wvu", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))

    def forward(self, *inputs):
        return self.function(*inputs, *self.parameters())


def test_a_sequential(check, lines):
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).requires_grad_(False)
    program = check(model, torch.randn(2, 7))
    assert lines(program) == ["linear(input_1, p_0_weight, p_0_bias)", "linear(relu, p_2_weight)"]
    assert list(program.weights) == ["0.weight", "2.weight"]
    assert program.weights["2.weight"].is_head
    assert not program.weights["0.weight"].is_head


X = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
FLAT = X[0]
FORMS = {
    "x @ w": (lambda x, w: x @ w, X, (7, 5), True),
    "x @ w.T": (lambda x, w: x @ w.T, X, (5, 7), False),
    "x @ w.mT": (lambda x, w: x @ w.mT, X, (5, 7), False),
    "x @ w.permute(1, 0)": (lambda x, w: x @ w.permute(1, 0), X, (5, 7), False),
    "x @ w.T.T": (lambda x, w: x @ w.t().transpose(0, 1), X, (7, 5), True),
    "x @ w.detach().contiguous()": (lambda x, w: x @ w.detach().contiguous(), X, (7, 5), True),
    "x @ w.to(same)": (lambda x, w: x @ w.to(torch.float32).view(7, 5), X, (7, 5), True),
    "vector @ w": (lambda x, w: x @ w, X[0, 0], (7, 5), True),
    "w @ vector": (lambda x, w: w @ x, X[0, 0], (5, 7), False),
    "w @ x": (lambda x, w: w @ x, X.mT, (5, 7), False),
    "w.T @ x": (lambda x, w: w.T @ x, X.mT, (7, 5), True),
    "mm": (torch.mm, FLAT, (7, 5), True),
    "linear": (F.linear, X, (5, 7), False),
    "linear(w.T)": (lambda x, w: F.linear(x, w.T), X, (7, 5), True),
    "einsum bti,oi->bto": (lambda x, w: torch.einsum("bti,oi->bto", x, w), X, (5, 7), False),
    "einsum bti,io->bto": (lambda x, w: torch.einsum("bti, io -> bto", x, w), X, (7, 5), True),
    "einsum oi,...i->...o": (lambda x, w: torch.einsum("oi,...i->...o", w, x), X, (5, 7), False),
    "einsum with w.T": (lambda x, w: torch.einsum("bti,oi->bto", x, w.T), X, (7, 5), True),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_product_is_one_linear(name, check, calls):
    function, x, shape, is_transposed = FORMS[name]
    program = check(Product(function, shape), x)
    weight = program.weights["w"]
    assert len(calls(program)) == 1
    assert (weight.kinds, weight.is_transposed) == (("linear",), is_transposed)
    assert weight.in_features == 7
    assert weight.is_head
    assert not program.rest


# Sizes in multiples of 4: torch's own grouped matmul wants rows of 16 bytes.
Y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
BATCHED = {
    "bmm(x, w)": (torch.bmm, Y, (2, 8, 12), True),
    "bmm(x, w.mT)": (lambda x, w: torch.bmm(x, w.mT), Y, (2, 12, 8), False),
    "x @ w": (lambda x, w: x @ w, Y, (2, 8, 12), True),
    "bmm(w, x)": (lambda x, w: torch.bmm(w, x), Y.mT, (2, 12, 8), False),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_batched_product_is_one_grouped_linear(name, check):
    function, x, shape, is_transposed = BATCHED[name]
    program = check(Product(function, shape), x)
    weight = program.weights["w"]
    assert (weight.kinds, weight.is_transposed) == (("grouped_linear",), is_transposed)
    assert (weight.in_features, weight.rows) == (8, 24)
    assert not program.rest


def test_addmm_keeps_its_bias_or_adds_what_is_none(check, lines):
    program = check(Product(lambda x, w, b: torch.addmm(b, x, w), (7, 5), (5,)), FLAT)
    assert lines(program) == ["linear(inputs_0, p_w, p_v, is_transposed)"]
    assert "aten.add" not in {op_name(node) for node in program.graph.graph.nodes}
    program = check(Product(lambda x, y, w: torch.addmm(y, x, w), (7, 5)), FLAT, torch.randn(3, 5))
    assert lines(program) == ["linear(inputs_0, p_w, is_transposed)"]
    assert "aten.add" in {op_name(node) for node in program.graph.graph.nodes}
    program = check(Product(lambda x, y, w: torch.baddbmm(y, x, w), (2, 8, 12)), Y, torch.randn(2, 3, 12))
    assert program.weights["w"].kinds == ("grouped_linear",)


def test_grouped_mm_through_torch(check):
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 8, dtype=torch.bfloat16)  # tracing allows no other dtype
    model = Product(lambda x, n, w: F.grouped_mm(x, w.mT, offs=n), (3, 16, 8)).to(torch.bfloat16)
    program = check(model, x, offsets)
    assert program.weights["w"].kinds == ("grouped_linear",)
    assert not program.weights["w"].is_transposed


def test_weights_shared_by_two_modules_keep_their_names_at_each_use(check):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 7)
            self.head = nn.Linear(7, 11)
            self.head.weight = self.embed.weight
            self.requires_grad_(False)

        def forward(self, ids):
            return self.head(self.embed(ids)) * 2.0

    program = check(Tied(), torch.tensor([[1, 2, 10]]))
    (weight,) = program.weights.values()
    assert (weight.name, weight.aliases) == ("embed.weight", ("head.weight",))
    uses = [(use.kind, use.feeds_output) for use in weight.uses]
    assert uses == [("embedding", False), ("linear", True)]


# Near misses: each stays as it was, with the reason.

NEAR_MISSES = {
    "also added": (
        lambda x, w: x @ w + w[0],
        X,
        (7, 5),
        "used as linear, but also read by aten.select",
        True,
    ),
    "squared": (lambda x, w: x @ (w * w), X, (7, 5), "the weight of aten.matmul is computed of it", True),
    "w @ w": (lambda x, w: x @ (w @ w), X, (7, 7), "both operands of aten.matmul", True),
    "broadcast": (
        lambda x, w: x @ w,
        X,
        (4, 1, 7, 5),
        "aten.matmul of (2, 3, 7) by (4, 1, 7, 5) is neither linear nor grouped",
        True,
    ),
    "table": (lambda x, w: x + w[: x.shape[1]], X, (9, 7), "read by aten.slice", False),
    "added": (lambda x, w: x + w, X, (3, 7), "read by aten.add", False),
    "indexed": (lambda x, w: x + w[torch.tensor([0, 2, 1])], X, (9, 7), "read by aten.index", False),
    "convolution": (
        lambda x, w: F.conv1d(x.mT, w),
        X,
        (5, 7, 2),
        "convolution kernel",
        False,
    ),
    "query": (lambda x, w: F.linear(w, x[0]), X, (5, 7), "the input of aten.linear", False),
    "unread": (lambda x, w: x * 2, X, (5, 7), "never read by the captured graph", True),
    "returned": (lambda x, w: (x, w), X, (5, 7), "returned by the model", False),
    "lookup of columns": (
        lambda x, w: F.embedding(torch.tensor([1]), w.T) + x,
        X,
        (7, 5),
        "look-up in something else than the rows of a matrix",
        False,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays_and_says_why(name, check, calls):
    function, x, shape, reason, is_matmul = NEAR_MISSES[name]
    program = check(Product(function, shape), x)
    assert not program.weights
    assert not calls(program)
    assert (program.rest["w"].reason, program.rest["w"].is_matmul) == (reason, is_matmul)


def test_of_a_product_of_two_parameters_the_right_one_is_the_weight(check):
    program = check(Product(lambda x, a, b: x @ (a @ b), (7, 2), (2, 5)), X)
    assert list(program.weights) == ["v"]
    assert program.rest["w"].reason == "left operand of aten.matmul of two parameters"
    assert program.rest["w"].is_matmul


def test_multihead_attention_is_read_through_rows_of_its_weight(check):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
            self.proj = nn.Linear(8, 5).requires_grad_(False)

        def forward(self, x, memory):
            return self.proj(self.attention(x, memory, memory, need_weights=False)[0])

    program = check(Model().eval(), Y, torch.randn(2, 4, 8))
    weights = program.weights
    assert list(weights) == ["attention.in_proj_weight", "attention.out_proj.weight", "proj.weight"]
    assert [use.kind for use in weights["attention.in_proj_weight"].uses] == ["linear", "linear"]
    bias = program.rest["attention.in_proj_bias"]
    assert (bias.reason, bias.is_matmul) == ("1-D: norm weight or bias", False)


def test_learned_queries_are_activations(check):
    program = check(
        Product(lambda x, q, w: F.linear(q.expand(2, 3, 7), w) + x[..., :5], (1, 3, 7), (5, 7)), X
    )
    assert list(program.weights) == ["v"]
    assert (program.rest["w"].reason, program.rest["w"].is_matmul) == ("read by aten.expand", False)


def test_recurrent_weights_are_two_linears_a_step(check):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(7, 5).requires_grad_(False)

        def forward(self, x):
            return self.lstm(x)[0]

    program = check(Model(), X)
    uses = {name: len(weight.uses) for name, weight in program.weights.items()}
    assert uses == {"lstm.weight_ih_l0": 1, "lstm.weight_hh_l0": len(X)}


def test_what_happens_inside_a_sub_graph_is_not_passed_over(check):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(7, 5).requires_grad_(False)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.proj(x)

    program = check(Model(), X)
    rest = program.rest["proj.weight"]
    assert (rest.reason, rest.is_matmul) == ("read inside the sub-graph of 'wrap_with_autocast'", True)


def test_a_buffer_as_a_weight_and_an_integer_parameter_stay(check):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("basis", torch.randn(7, 5))
            self.count = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)

        def forward(self, x):
            return x @ self.basis + self.count.sum()

    program = check(Model(), X)
    assert program.rest["basis"].reason == "persistent buffer, not a parameter"
    assert program.rest["basis"].is_matmul
    assert not program.rest["basis"].is_parameter
    assert program.rest["count"].reason == "int32 is not a dtype to quantize from"


def test_the_captured_program_is_not_changed(tiny_model):
    captured = capture(tiny_model("gpt2", is_meta=True))
    code, rest = captured.graph.code, dict(captured.rest)
    Canonicalize().run(captured)
    assert (captured.graph.code, dict(captured.rest), captured.stage) == (code, rest, Stage.CAPTURED)


def test_dead_code_goes_and_updates_in_place_stay(canonicalize):
    def function(x, w):
        y = x @ w
        y.add_(1)
        (y @ w.T).relu()
        return y * 2

    program = canonicalize(Product(function, (7, 5)), (X,))
    names = [op_name(node) for node in program.graph.graph.nodes if node.op == "call_function"]
    assert "aten.add_" in names
    assert "aten.relu" not in names


def test_what_meets_rows_that_data_picks_is_looked_at():
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.randn(1, 64)), nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x[x[:, 0] > 0] * self.scale)

    program = Canonicalize().run(capture(Picked(), (torch.randn(5, 64),)))
    assert list(program.weights) == ["linear.weight"]
