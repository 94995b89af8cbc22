"""Rotated residual streams: the same model of other tensors, or a reason why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbitc
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import Calibrator
from kbitc.errors import PassError, UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.passes import rotate
from kbitc.passes._proof import TOLERANCE, proven
from kbitc.passes.rotate import FACT, Rotate, Rotation
from kbitc.pipeline.manager import PassManager

IDS = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = {"gpt2", "gpt_neox", "opt", "bloom", "llama", "mixtral"}


@pytest.mark.parametrize("width", [1, 2, 7, 64, 75, 128, 576])
@pytest.mark.parametrize("is_centred", [False, True])
def test_a_rotation_is_orthogonal(width, is_centred):
    rotation = Rotation.of(width, 0, is_centred=is_centred)
    dense = rotation.applied(torch.eye(width)).double()
    torch.testing.assert_close(dense @ dense.T, torch.eye(width).double(), atol=1e-5, rtol=0)
    rows = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotation.applied(rows), (rows.double() @ dense).float(), atol=1e-5, rtol=1e-5)
    if is_centred:
        torch.testing.assert_close(rotation.applied(torch.ones(width)), torch.ones(width), atol=1e-5, rtol=0)
    elif width > 32:
        assert dense.abs().max() < 0.9  # every feature goes into many


def program_of(model, ids=IDS):
    checkpoint = open_checkpoint(model)
    is_text = getattr(getattr(model, "config", None), "model_type", "") in TEXT
    context = Context(checkpoint.read, Calibrator(checkpoint, ids if is_text else "random"))
    return PassManager(["canonicalize"]).run(capture(checkpoint.skeleton(), context=context))


@pytest.mark.parametrize(
    ("family", "gain", "others"),
    [
        ("llama", "model.layers.1.input_layernorm.weight", []),
        (
            "mixtral",
            "model.layers.0.post_attention_layernorm.weight",
            ["model.layers.0.mlp.experts.down_proj"],
        ),
        # LayerNorms, whose shifts turn, and biases; and look-up tables of positions.
        ("gpt_neox", "gpt_neox.layers.0.input_layernorm.weight", ["gpt_neox.layers.0.attention.dense.bias"]),
        ("opt", "model.decoder.final_layer_norm.weight", ["model.decoder.embed_positions.weight"]),
    ],
)
def test_another_model_of_the_same_function(family, gain, others, tiny_model):
    model = tiny_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = program_of(model)
    after = PassManager([Rotate()], is_checked=True).run(before)
    (group,) = after.facts[FACT].groups
    assert after.facts[FACT].left == {}
    assert after.read(gain).tolist() == [1] * len(after.read(gain))
    for name in (*group, *others):
        assert not torch.allclose(after.read(name), before.read(name))
    assert proven(before, after, "rotate") < TOLERANCE / 10
    # What the artifact loads into: the model's own class.
    dense = type(model)(model.config).eval()
    dense.load_state_dict(
        {**state, **{n: after.read(n) for n in (*after.weights, *after.rest)}}, strict=False
    )
    with torch.no_grad():
        wanted, got = model(IDS).logits, dense(IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for name, tensor in model.state_dict().items():  # the caller's own
        assert torch.equal(tensor, state[name])


def test_two_runs_rotate_alike(tiny_model):
    one, two = (PassManager([Rotate()]).run(program_of(tiny_model("llama"))) for _ in range(2))
    other = PassManager([Rotate(seed=1)]).run(program_of(tiny_model("llama")))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one.read(name), two.read(name))
    assert not torch.allclose(one.read(name), other.read(name))


def test_a_compiled_model_is_the_same_model(tiny_model):
    model = tiny_model("llama")
    passes = ["canonicalize", "rotate", "apply_plan"]
    packed = kbitc.compile(model, spec="int8:32", passes=passes, calibrate=IDS)
    with torch.no_grad():
        wanted, got = model(IDS).logits, packed(IDS).logits
    assert (got - wanted).norm() < 0.02 * wanted.norm()
    assert packed.get_parameter("model.norm.weight").tolist() == [1] * 48


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "read by 'transformer.wte.weight', which has other readers"),  # a tied head
        ("t5", "read by 'shared.weight', which has other readers"),
        ("roberta", "'roberta.embeddings.LayerNorm.weight' cannot be moved"),  # norms after the sums
        ("clip", "the model returns it"),
    ],
)
def test_what_cannot_turn_has_a_reason(family, reason, tiny_model):
    program = program_of(tiny_model(family))
    after = PassManager([Rotate()], is_checked=True).run(program)
    record = after.facts[FACT]
    assert record.groups == ()
    assert any(reason in why for why in record.left.values())
    assert not any(after.is_changed(name) for name in (*after.weights, *after.rest))


class Blocks(nn.Module):
    """A stream of one block, and what a function makes of it."""

    def __init__(self, read):
        super().__init__()
        self.start, self.norm, self.block = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        for norm in (self.norm, self.last):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.read = read

    def forward(self, x):
        h = self.start(x)
        h = h + self.block(self.norm(h))
        return self.read(self, h, x)


def rotated(read, change=lambda _: None):
    torch.manual_seed(0)
    module = Blocks(read).requires_grad_(False).eval()
    change(module)
    x = torch.randn(2, 5, 4)
    checkpoint = open_checkpoint(module)
    context = Context(checkpoint.read, Calibrator(checkpoint, "random", inputs={"x": x}))
    program = PassManager(["canonicalize"]).run(capture(checkpoint.skeleton(), (x,), context=context))
    return PassManager([Rotate()], is_checked=True).run(program).facts[FACT]


@pytest.mark.parametrize(
    "read",
    [
        lambda m, h, x: m.head(m.last(h)),
        lambda m, h, x: m.head(m.last(h * 0.5 - h / x[..., :1].exp())),
        lambda m, h, x: m.head(m.last(h.sum(1))),
        lambda m, h, x: m.head(m.last(h[:, torch.tensor([0, 3])].transpose(0, 1))),
        lambda m, h, x: m.head(m.last(h)) + m.head.bias.sum() * 0,
    ],
)
def test_what_turns_with_the_stream(read):
    record = rotated(read)
    assert len(record.groups) == 1
    assert set(record.groups[0]) >= {"start.weight", "start.bias", "block.weight", "head.weight", "last.bias"}


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda m, h, x: (m.head(m.last(h)), h), "the model returns it"),
        (lambda m, h, x: m.head(m.last(h.relu())), "aten.relu reads it"),
        (lambda m, h, x: m.head(m.last(h * h)), "aten.mul reads it"),
        (lambda m, h, x: m.head(m.last(h + 1)), "aten.add reads it"),
        (lambda m, h, x: m.head(m.last(h.flip(-1))), "aten.flip reads it"),
        (lambda m, h, x: m.head(m.last(h + x.repeat(1, 1, 2)[..., :6])), "makes it"),
        (lambda m, h, x: m.head(m.last(h)) + m.head(h), "has other readers"),
        (
            lambda m, h, x: m.head(m.last(h)) + m.start.bias[:3],
            "what is added to it is no parameter, or read",
        ),
        (lambda m, h, x: (m.head(m.last(h)), h.sum(-1)), "aten.sum reads it"),
    ],
)
def test_what_sees_a_rotation_keeps_the_stream(read, reason):
    record = rotated(read)
    assert record.groups == ()
    assert any(reason in why for why in record.left.values()), record.left


def test_a_gain_of_nearly_nothing_stays():
    record = rotated(lambda m, h, x: m.head(m.last(h)), lambda m: m.last.weight[2].fill_(1e-6))
    assert "'last.bias' is up to" in next(iter(record.left.values()))


def test_it_comes_before_measuring(tiny_model):
    program = PassManager(["measure_moments"]).run(program_of(tiny_model("llama")))
    with pytest.raises(UsageError, match="put it before"):
        PassManager([Rotate()]).run(program)


def test_another_function_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(rotate, "_orthogonal", lambda size, _: torch.eye(size, dtype=torch.float64) * 1.01)
    with pytest.raises(PassError, match="pass 'rotate': the changed model is another function"):
        PassManager([Rotate()]).run(program_of(tiny_model("llama")))
