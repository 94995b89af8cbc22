"""A student's gradients, against those of the dense model by torch alone, in float64."""

from __future__ import annotations

import pytest
import torch

from kbitc.formats import bit_planes
from kbitc.formats.scales import effective_scales

CASES = [
    ("llama", "nf3:10"),
    ("llama", "learned3:7+zp"),
    ("gpt2", "int3:16+zp+dq"),
    ("gpt2", "nf4:64+out6%"),
    ("mixtral", "int4:9+dq"),
    ("mixtral", "learned2:32+out3%"),
    ("roberta", "nf4:16+dq"),
]


def in_double(packed, values):
    """The dense weight that some values stand for, as the formula says it."""
    own = packed.operands()
    codes = bit_planes.unpack(own.planes, own.in_features, own.bits).long()
    flat = own.scales.flatten(0, -2)
    scales = effective_scales(flat, own.scale_codebook, own.scale_absmax, own.scale_mean).double()
    scales = scales.view(own.scales.shape)
    logs = values["rows"] + values["blocks"] + values["scales"]

    def spread(blocks):
        return blocks.repeat_interleave(own.block, -1)[..., : own.in_features]

    levels = own.codebook.double() + values.get("codebook", 0.0)
    dense = levels[codes] * spread(scales * logs.exp())
    if own.zeros is not None:
        dense = dense + spread(own.zeros.double() + scales.abs() * values["zeros"])
    if own.outlier_values is not None:
        kept = own.outlier_values.double()
        columns = own.outlier_index.long()
        dense = dense.index_copy(-1, columns, kept + kept.square().mean().sqrt() * values["outliers"])
    return dense


def reference(school, values):
    """The loss on all lessons, with the whole distribution, from the dense model in float64."""
    plan, state = school.artifact.plan, school.artifact.state()
    entries = plan.weights
    student = {name: p.double() for name, p in school.model.state_dict().items() if p.is_floating_point()}
    for name, tensor in state.items():
        names = (name, *{**plan.left_alone, **entries}[name].aliases)
        own = {what: value for (owner, what), value in values.items() if owner == name}
        if name in school.room.weights:
            dense = in_double(tensor.packed, own)
            dense = dense.mT if entries[name].is_transposed else dense
            dense = dense.reshape(entries[name].shape)
        else:
            dense = tensor.double()
            if own:
                dense = dense + dense.square().mean().sqrt() * own["value"]
        student |= dict.fromkeys(names, dense)
    model = school.model.double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped matmul takes no float64
    total = 0.0
    for lesson in school.lessons:
        taught = model(**lesson.feed).logits[0].detach().log_softmax(-1)
        learned = torch.func.functional_call(model, student, kwargs=lesson.feed, tie_weights=False).logits[0]
        top = taught.topk(64).indices
        p, q = taught.exp().gather(-1, top), learned.log_softmax(-1).exp().gather(-1, top)
        p, q = (torch.cat([m, 1 - m.sum(-1, keepdim=True)], -1) for m in (p, q))
        total = total + (p * (p / q).log()).sum(-1).mean()
    return total / len(school.lessons)


@pytest.mark.parametrize("is_halved", [False, True])
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_gradients_are_those_of_the_dense_model(family, spec, is_halved, schooled, monkeypatch):
    if is_halved:  # as large models have it: kept at 16 bits, matrices in parts
        monkeypatch.setattr("kbitc.sensitivity.streaming.LARGE", 1)
        monkeypatch.setattr("kbitc.sensitivity.streaming.PART", 300)
    school = schooled(family, spec)
    tuned = school.room.start()
    loss, found = school.room.gradients(school.room.stored(tuned), tuned, school.lessons)
    values = {key: value.double().requires_grad_() for key, value in tuned.items()}
    wanted = reference(school, values)
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    gradients = torch.autograd.grad(wanted, list(values.values()), allow_unused=True)
    checked = 0
    for key, gradient in zip(values, gradients, strict=True):
        if gradient is None or not gradient.any():
            assert key not in found or found[key].abs().max() < 1e-6, key
            continue
        checked += 1
        scale = gradient.abs().max()
        allowed = 0.1 * scale + 1e-7 if is_halved else 2e-3 * scale + 1e-8
        assert (found[key] - gradient).abs().max() < allowed, key
    assert checked > 10
