from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from kbitc.graph.capture import capture
from kbitc.graph.example_inputs import example_inputs
from kbitc.graph.program import CANONICAL, Stage
from kbitc.graph.weight_reads import op_name
from kbitc.passes.canonicalize import Canonicalize
from kbitc.pipeline.manager import PassManager

# family: packable weights and the rest, of the two-layer models in conftest.py
COUNTS = {
    "gpt2": (10, 18),  # wte (tied), wpe, 2 x (c_attn, c_proj, c_fc, c_proj)
    "opt": (16, 22),  # embed (tied), positions, project_in, project_out, 2 x (q, k, v, out, fc1, fc2)
    "bloom": (9, 20),  # embed (tied), 2 x (qkv, dense, h_to_4h, 4h_to_h)
    "gpt_neox": (10, 18),  # embed_in, embed_out, 2 x 4
    "llama": (16, 5),  # embed, head, 2 x 7
    "mixtral": (16, 5),  # embed, head, 2 x (q, k, v, o, router, gate_up, down)
    "roberta": (16, 26),  # word (tied), position, type, lm_head.dense, 2 x 6
    "bart": (35, 57),  # shared (tied 4 times), 2 positions, 2 x 6 + 2 x 10; final_logits_bias is rest
    "t5": (39, 12),  # shared (tied), 2 position biases, 2 x 7 + 2 x 11
    "clip": (29, 49),  # token, 2 positions, 2 projections, 4 x 6; patches, logit_scale are rest
}
TIED = {
    "gpt2": ("transformer.wte.weight", ("lm_head.weight",)),
    "opt": ("model.decoder.embed_tokens.weight", ("lm_head.weight",)),
    "bloom": ("transformer.word_embeddings.weight", ("lm_head.weight",)),
    "roberta": ("roberta.embeddings.word_embeddings.weight", ("lm_head.decoder.weight",)),
    "bart": (
        "model.shared.weight",
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
    ),
    "t5": ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
}


@pytest.fixture(scope="module")
def family_program(tiny_model):
    """``family_program(family)``: the canonical program of the family's meta model, made once."""
    return functools.cache(lambda family: canonicalize(tiny_model(family, is_meta=True)))


def canonicalize(model, inputs=None):
    return PassManager([Canonicalize()], is_checked=True).run(capture(model, inputs))


def run(program, model, inputs):
    """The program's graph on a model's real tensors and real inputs."""
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    names = [node.name for node in program.graph.graph.nodes if node.op == "placeholder"]
    given = iter(inputs)
    lifted = program.parameters
    return program.graph(*(state[lifted[name]] if name in lifted else next(given) for name in names))


def check(model, *inputs):
    """Canonicalize a module; its outputs must not change."""
    program = canonicalize(model, inputs)
    expected = pytree.tree_leaves(model(*inputs))
    for got, want in zip(run(program, model, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return program


def calls(program):
    return [n for n in program.graph.graph.nodes if n.op == "call_function" and n.target in CANONICAL]


def lines(program):
    """The canonical calls as text, in order."""
    return [
        f"{CANONICAL[n.target]}({', '.join(str(a) for a in (*n.args, *n.kwargs))})" for n in calls(program)
    ]


def modules_weights(model):
    """First names of what must be found: weights of Linear, Conv1D, Embedding, and 3-D experts."""
    from transformers.pytorch_utils import Conv1D

    wanted = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or type(module).__name__.endswith("Router")
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted or (parameter.dim() == 3 and "experts" in name)
    ]


@pytest.mark.parametrize("family", COUNTS)
def test_every_matmul_weight_of_a_family_is_found_once(tiny_model, family_program, family):
    model = tiny_model(family, is_meta=True)
    program = family_program(family)
    assert program.stage is Stage.CANONICAL
    assert list(program.weights) == modules_weights(model)
    assert (len(program.weights), len(program.rest)) == COUNTS[family]
    assert not any(rest.is_matmul for rest in program.rest.values())
    assert program.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    for name, weight in program.weights.items():
        assert weight.shape == tuple(model.get_parameter(name).shape)
        assert {use.kind for use in weight.uses} <= set(CANONICAL.values())
        assert {use.parameter for use in weight.uses} <= {name, *weight.aliases}


@pytest.mark.parametrize("family", COUNTS)
def test_no_call_with_a_weight_is_left_in_another_form(family_program, family):
    program = family_program(family)
    lifted = {n for n in program.graph.graph.nodes if program.parameters.get(n.name) in program.weights}
    for node in lifted:
        assert {user.target for user in node.users} <= set(CANONICAL)
    uses = [use.node for weight in program.weights.values() for use in weight.uses]
    assert sorted(uses) == sorted(node.name for node in calls(program))
    for node in program.graph.graph.nodes:
        assert op_name(node) not in ("aten.linear", "aten.addmm", "aten.mm", "aten.embedding")
        assert op_name(node) != "aten._assert_tensor_metadata"


@pytest.mark.parametrize("family", COUNTS)
def test_outputs_of_a_family_do_not_change(tiny_model, family):
    model = tiny_model(family)
    program = canonicalize(model)
    made = example_inputs(model)
    torch.manual_seed(1)
    inputs = {}
    for name, like in made.items():
        if name == "attention_mask":
            inputs[name] = torch.ones(like.shape, dtype=like.dtype)
        elif like.dtype is torch.int64:
            inputs[name] = torch.randint(3, 100, like.shape)
        else:
            inputs[name] = torch.randn(like.shape, dtype=like.dtype)
    names = [
        n.name
        for n in program.graph.graph.nodes
        if n.op == "placeholder" and n.name not in program.parameters
    ]
    model.config.use_cache = False
    with torch.no_grad():
        got = run(program, model, [inputs[name] for name in names])
        expected = pytree.tree_leaves(model(**inputs, **({} if family == "clip" else {"use_cache": False})))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_are_one_decision_with_all_uses(family_program, family):
    name, aliases = TIED[family]
    program = family_program(family)
    weight = program.weights[name]
    assert weight.aliases == aliases
    assert weight.kinds == ("embedding", "linear")
    assert not set(aliases) & {*program.weights, *program.rest}
    heads = [use.parameter for use in weight.uses if use.kind == "linear"]
    assert heads == [aliases[-1]]
    assert [w.name for w in program.weights.values() if w.is_head] == [name]


def test_heads_are_marked(family_program):
    llama = family_program("llama")
    assert [weight.name for weight in llama.weights.values() if weight.is_head] == ["lm_head.weight"]


def test_reasons_of_the_rest(family_program):
    clip = family_program("clip").rest
    assert clip["vision_model.embeddings.patch_embedding.weight"].reason == "convolution kernel"
    assert clip["logit_scale"].reason == "a scalar"
    assert clip["vision_model.pre_layrnorm.weight"].reason == "1-D: norm weight or bias"
    bart = family_program("bart").rest
    assert bart["final_logits_bias"].reason == "persistent buffer, not a parameter"


def test_experts_are_grouped_and_conv1d_is_transposed(family_program):
    mixtral = family_program("mixtral").weights
    experts = mixtral["model.layers.0.mlp.experts.down_proj"]
    assert (experts.kinds, experts.is_transposed) == (("grouped_linear",), False)
    assert (experts.in_features, experts.rows) == (40, 3 * 48)
    gpt2 = family_program("gpt2").weights
    attention = gpt2["transformer.h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.is_transposed, attention.in_features) == ((36, 108), True, 36)
    assert not gpt2["transformer.wte.weight"].is_transposed


def test_half_precision_models_are_canonical_too():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    program = canonicalize(model)
    assert {weight.dtype for weight in program.weights.values()} == {torch.bfloat16}
    assert sum(weight.kinds == ("grouped_linear",) for weight in program.weights.values()) == 2


# Plain modules: one form each.


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


def test_a_sequential():
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
def test_a_product_is_one_linear(name):
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
def test_a_batched_product_is_one_grouped_linear(name):
    function, x, shape, is_transposed = BATCHED[name]
    program = check(Product(function, shape), x)
    weight = program.weights["w"]
    assert (weight.kinds, weight.is_transposed) == (("grouped_linear",), is_transposed)
    assert (weight.in_features, weight.rows) == (8, 24)
    assert not program.rest


def test_addmm_keeps_its_bias_or_adds_what_is_none():
    program = check(Product(lambda x, w, b: torch.addmm(b, x, w), (7, 5), (5,)), FLAT)
    assert lines(program) == ["linear(inputs_0, p_w, p_v, is_transposed)"]
    assert "aten.add" not in {op_name(node) for node in program.graph.graph.nodes}
    program = check(Product(lambda x, y, w: torch.addmm(y, x, w), (7, 5)), FLAT, torch.randn(3, 5))
    assert lines(program) == ["linear(inputs_0, p_w, is_transposed)"]
    assert "aten.add" in {op_name(node) for node in program.graph.graph.nodes}
    program = check(Product(lambda x, y, w: torch.baddbmm(y, x, w), (2, 8, 12)), Y, torch.randn(2, 3, 12))
    assert program.weights["w"].kinds == ("grouped_linear",)


def test_grouped_mm_through_torch():
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 8, dtype=torch.bfloat16)  # tracing allows no other dtype
    model = Product(lambda x, n, w: F.grouped_mm(x, w.mT, offs=n), (3, 16, 8)).to(torch.bfloat16)
    program = check(model, x, offsets)
    assert program.weights["w"].kinds == ("grouped_linear",)
    assert not program.weights["w"].is_transposed


def test_weights_shared_by_two_modules_keep_their_names_at_each_use():
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
    uses = [(use.kind, use.parameter, use.feeds_output) for use in weight.uses]
    assert uses == [("embedding", "embed.weight", False), ("linear", "head.weight", True)]


# Near misses: each stays as it was, with the reason.

NEAR_MISSES = {
    "both ways": (lambda x, w: x @ w @ w.T, X, (7, 5), "used both as (out, in) and as (in, out)", True),
    "also added": (
        lambda x, w: x @ w + w[0],
        X,
        (7, 5),
        "used as linear, but also read by aten.select",
        True,
    ),
    "cut": (lambda x, w: x @ w[:, :3], X, (7, 5), "read by aten.matmul through aten.slice", True),
    "cast": (
        lambda x, w: x.double() @ w.double(),
        X,
        (7, 5),
        "cast to float64 before aten.matmul",
        True,
    ),
    "squared": (lambda x, w: x @ (w * w), X, (7, 5), "read by aten.mul", False),
    "w @ w": (lambda x, w: x @ (w @ w), X, (7, 7), "both operands of aten.matmul", True),
    "scaled addmm": (
        lambda x, w: torch.addmm(x[0], x, w, alpha=2),
        X[0],
        (7, 7),
        "aten.addmm with alpha 2 and beta 1",
        True,
    ),
    "broadcast": (
        lambda x, w: x @ w,
        X,
        (4, 1, 7, 5),
        "aten.matmul of (2, 3, 7) by (4, 1, 7, 5) is neither linear nor grouped",
        True,
    ),
    "einsum": (
        lambda x, w: torch.einsum("bti,oi->bot", x, w),
        X,
        (5, 7),
        "einsum 'bti,oi->bot' is not a linear map of the last dimension",
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
    "unread": (lambda x, w: x * 2, X, (5, 7), "never read by the captured graph", False),
    "returned": (lambda x, w: (x, w), X, (5, 7), "returned by the model", False),
    "lookup of columns": (
        lambda x, w: F.embedding(torch.tensor([1]), w.T) + x,
        X,
        (7, 5),
        "look-up in something else than the rows of a matrix",
        False,
    ),
    "vector": (
        lambda x, w: x @ w,
        X,
        (7,),
        "aten.matmul of (2, 3, 7) by (7,) is neither linear nor grouped",
        True,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays_and_says_why(name):
    function, x, shape, reason, is_matmul = NEAR_MISSES[name]
    program = check(Product(function, shape), x)
    assert not program.weights
    assert not calls(program)
    assert (program.rest["w"].reason, program.rest["w"].is_matmul) == (reason, is_matmul)


def test_of_a_product_of_two_parameters_the_right_one_is_the_weight():
    program = check(Product(lambda x, a, b: x @ (a @ b), (7, 2), (2, 5)), X)
    assert list(program.weights) == ["v"]
    assert program.rest["w"].reason == "left operand of aten.matmul of two parameters"
    assert program.rest["w"].is_matmul


def test_multihead_attention_is_left_alone_for_it_cannot_run_packed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
            self.proj = nn.Linear(8, 5).requires_grad_(False)

        def forward(self, x, memory):
            return self.proj(self.attention(x, memory, memory, need_weights=False)[0])

    program = check(Model().eval(), Y, torch.randn(2, 4, 8))
    assert list(program.weights) == ["proj.weight"]
    for name in ("in_proj_weight", "out_proj.weight"):
        rest = program.rest[f"attention.{name}"]
        assert rest.reason == "nn.MultiheadAttention computes with plain tensors only"
        assert rest.is_matmul
    bias = program.rest["attention.in_proj_bias"]
    assert (bias.reason, bias.is_matmul) == ("1-D: norm weight or bias", False)


def test_learned_queries_are_activations():
    program = check(
        Product(lambda x, q, w: F.linear(q.expand(2, 3, 7), w) + x[..., :5], (1, 3, 7), (5, 7)), X
    )
    assert list(program.weights) == ["v"]
    assert (program.rest["w"].reason, program.rest["w"].is_matmul) == ("read by aten.expand", False)


def test_recurrent_weights_are_reported_as_matmuls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(7, 5).requires_grad_(False)

        def forward(self, x):
            return self.lstm(x)[0]

    program = check(Model(), X)
    assert program.rest["lstm.weight_ih_l0"].reason == "read by aten.lstm"
    assert program.rest["lstm.weight_ih_l0"].is_matmul


def test_what_happens_inside_a_sub_graph_is_not_passed_over():
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


def test_a_buffer_as_a_weight_and_an_integer_parameter_stay():
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


def test_dead_code_goes_and_updates_in_place_stay():
    def function(x, w):
        y = x @ w
        y.add_(1)
        (y @ w.T).relu()
        return y * 2

    program = canonicalize(Product(function, (7, 5)), (X,))
    names = [op_name(node) for node in program.graph.graph.nodes if node.op == "call_function"]
    assert "aten.add_" in names
    assert "aten.relu" not in names
