"""The quantizer 'feedback': what it makes of second moments, under every kind of format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.formats.dequantize import dequantize
from kbitc.formats.spec import parse
from kbitc.quantizers import Evidence, find_quantizer, quantize_weight
from kbitc.quantizers.feedback import Feedback
from kbitc.sensitivity.gram import GRAM, Gram, RowGroup, equal_groups
from kbitc.sensitivity.moments import MOMENTS

ROWS, WIDTH = 45, 131
SPECS = [
    "nf3:64",
    "int4:32",
    "int3:50+zp",
    "nf4:64+dq",
    "int2:32+zp+dq",
    "nf3:64+out3%",
    "bof4:64",
    "learned3:64",
]


def inputs(seed=0, tokens=900):
    """Of the source and of the packed model: correlated features, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(5))
    x = torch.randn(tokens, 12, generator=generator) @ mixed
    x = x + 0.5 * torch.randn(x.shape, generator=generator)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator) + 0.05 * x.roll(1, 1)


def gram(x, y):
    return Gram(y.mT @ y / len(x), x.mT @ y / len(x), len(x))


FITTED, JUDGING, FRESH = inputs(1), inputs(2), inputs(3)
KNOWN = replace(gram(*FITTED), held_out=gram(*JUDGING))
WEIGHT = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7)) / 10


def packed(spec, weight=WEIGHT, groups=None, **options):
    groups = equal_groups((KNOWN,), len(weight)) if groups is None else groups
    return Feedback(**options).quantize(weight, parse(spec), Evidence("w", None, {GRAM: groups}))


def error(made, weight=WEIGHT, tokens=FRESH):
    """Mean squared error of the output, on tokens that nothing was fitted to."""
    x, y = tokens
    return float((x @ weight.mT - y @ dequantize(made).mT).square().mean())


@pytest.mark.parametrize("spec", SPECS)
def test_outputs_are_nearer_than_with_searched_scales(spec):
    importance = KNOWN.inputs.diagonal()
    searched = quantize_weight(WEIGHT, spec, quantizer="weighted", importance=importance)
    made = packed(spec)
    assert made.spec == parse(spec)
    assert {n: (t.shape, t.dtype) for n, t in made.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in searched.tensors().items()
    }
    assert error(made) < 0.5 * error(searched)


@pytest.mark.parametrize("switch", ["target", "feedback", "refit"])
def test_each_step_helps(switch):
    assert error(packed("int3:64")) < error(packed("int3:64", **{switch: False}))


def test_polish_helps():
    assert error(packed("int2:32+zp")) < error(packed("int2:32+zp", polish=0))


def test_a_target_that_held_out_tokens_do_not_confirm_is_left():
    """A cross moment of chance: the rows stay where they were."""
    x, _ = FITTED
    noise = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    lying = replace(gram(noise, x), held_out=gram(x, x))
    groups = equal_groups((lying,), ROWS)
    honest = equal_groups((replace(gram(x, x), held_out=gram(x, x)),), ROWS)
    assert error(packed("nf4:64", groups=groups), tokens=(x, x)) == pytest.approx(
        error(packed("nf4:64", groups=honest), tokens=(x, x)), rel=0.1
    )


@pytest.mark.parametrize("tile", [16, 512])
def test_what_the_output_is_added_to_is_mended(monkeypatch, tile):
    """y = r + w x where the packed model has r^ = r + b x^: the weight can take b back."""
    monkeypatch.setattr("kbitc.quantizers.feedback.TILE", tile)
    x, y = FITTED
    wrong = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9)) / 30
    lost = -(y @ wrong.mT)  # r - r^
    residual = lost.mT @ y / len(y)
    (own,) = equal_groups((replace(gram(x, y), held_out=gram(x, y)),), ROWS)
    blind, aware = own, replace(own, residual=residual, held_out=residual)
    off = []
    for group in (blind, aware):
        back = dequantize(packed("nf4:32", groups=(group,)))
        off.append(float((x @ WEIGHT.mT + lost - y @ back.mT).square().mean()))
    assert off[1] < 0.3 * off[0]


def test_groups_may_be_scattered_rows():
    """Rows of two groups in turn: each as if it were alone, but for the scale search they share."""
    others = gram(*inputs(11))
    odd, even = torch.arange(1, ROWS, 2), torch.arange(0, ROWS, 2)
    groups = (RowGroup(odd, KNOWN), RowGroup(even, others))
    mixed = dequantize(packed("nf4:64", groups=groups, search=False))
    alone = dequantize(
        packed("nf4:64", WEIGHT[odd], equal_groups((KNOWN,), len(odd)), search=False, polish=0)
    )
    unpolished = dequantize(packed("nf4:64", groups=groups, search=False, polish=0))
    assert torch.equal(unpolished[odd], alone)
    assert mixed.shape == WEIGHT.shape


def test_experts_are_rounded_each_against_its_own():
    weight = torch.stack([WEIGHT, WEIGHT.flip(0)])
    grams = (KNOWN, gram(*inputs(13)))
    made = packed("nf4:64", weight, equal_groups(grams, 2 * ROWS), polish=0)
    assert made.shape == weight.shape
    for expert, own in enumerate(grams):
        alone = packed("nf4:64", weight[expert], equal_groups((own,), ROWS), polish=0)
        assert torch.equal(dequantize(made)[expert], dequantize(alone))


def test_gptq_as_published_is_one_setting():
    """Symmetric integers, absmax scales, the columns as they stand, the source's inputs: no more than feedback."""
    plain = dict(target=False, search=False, order=False, refit=False, polish=0, damping=0.01)
    spec = "int4:128"
    made = packed(spec, **plain)
    absmax = quantize_weight(WEIGHT, spec)
    assert torch.equal(made.scales, absmax.scales)
    assert error(made) < error(absmax)


def test_neither_cores_nor_a_second_run_change_a_bit():
    threads = torch.get_num_threads()
    first = packed("int3:50+zp")
    try:
        torch.set_num_threads(1)
        again = packed("int3:50+zp")
    finally:
        torch.set_num_threads(threads)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])


def test_options_stand_behind_the_name():
    found = find_quantizer("feedback(no-target, polish=1)")
    assert found == Feedback(target=False, polish=1)
    assert found.requires == (MOMENTS, GRAM)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("feedback(no-tarket)", "did you mean 'target'"),
        ("feedback(polish)", "write 'polish=...'"),
        ("feedback(target=1)", "write 'target' or 'no-target'"),
        ("feedback(polish=x)", "must be a whole number"),
        ("feedback(damping=-1)", "not negative"),
        ("feedback(", "expected a name"),
        ("absmax(polish=1)", "no option 'polish'"),
    ],
)
def test_wrong_options_are_named(name, says):
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        find_quantizer(name)
