"""Optimizer steps and weights to int8: native kernels give the bits of plain torch, and refuse what does not fit."""

from __future__ import annotations

import itertools

import pytest
import torch

from kbitc.formats.state_levels import state_bounds, state_levels
from kbitc.kernels import training, training_ops  # noqa: F401  # registers the ops
from kbitc.kernels.cpu.build import find_compiler
from kbitc.kernels.training import WHOLE, Rule, StepNumbers

try:
    find_compiler()
except Exception as error:  # noqa: BLE001
    pytest.skip(f"the native kernels cannot be built: {error}", allow_module_level=True)

SIZES = (0, 1, 2, 255, 5000)
NUMBERS = StepNumbers(-1.0, 0.01, 0.99, 1e-2, 0.9, 0.1, 0.999, 0.001, 3.0, 1e-8)
PLAIN = NUMBERS._replace(sign=1.0, l2=0.0)


def maps_of(bits):
    return state_levels(8 if bits == WHOLE else bits)


def empty_states(count, bits, rule, block):
    for _ in range(rule.states):
        if bits == WHOLE:
            yield from (torch.zeros(count), torch.zeros(0))
        else:
            yield torch.zeros(-(-count * bits // 8), dtype=torch.uint8)
            yield torch.zeros(-(-count // block))


def gradients(params):
    """Of many sizes, so that every decade of the maps is met."""
    return [(torch.randn_like(p) * torch.rand_like(p) ** 8).to(p.dtype) for p in params]


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_step_gives_the_bits_of_plain_torch(kernel_set, bits, rule):
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for block, dtype, numbers in itertools.product((2, 96, 256), dtypes, (NUMBERS, PLAIN)):
        params = [torch.randn(n).to(dtype) for n in SIZES]
        states = [s for n in SIZES for s in empty_states(n, bits, rule, block)]
        wanted_params, wanted_states = [p.clone() for p in params], [s.clone() for s in states]
        for _ in range(3):
            grads = gradients(params)
            rest = ([*numbers] * len(SIZES), int(rule), bits, block)
            torch.ops.kbit.optimizer_step(*maps_of(bits), params, grads, states, *rest)
            training.optimizer_step(
                maps_of(bits), wanted_params, grads, wanted_states, rest[0], rule, bits, block
            )
            for found, wanted in zip(params + states, wanted_params + wanted_states, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_squares_of_an_update(kernel_set, bits):
    torch.manual_seed(0)
    for count in (1, 7, 256, 5000):
        _, _, codes, scales = empty_states(count, bits, Rule.ADAM, 96)
        training.write_state(maps_of(bits), 1, torch.rand(count), codes, scales, bits, 96)
        given = (torch.randn(count), codes, scales, [*PLAIN], bits, 96)
        found = torch.ops.kbit.update_squares(*maps_of(bits), *given)
        torch.testing.assert_close(found, training.update_squares(maps_of(bits), *given), rtol=1e-6, atol=0)


def test_what_is_no_number_stays_none_and_no_other_block_is_touched(kernel_set):
    for bad in (float("nan"), float("inf")):
        param, states = torch.zeros(512), list(empty_states(512, 8, Rule.ADAM, 256))
        grad = torch.ones(512)
        grad[3] = bad
        torch.ops.kbit.optimizer_step(*maps_of(8), [param], [grad], states, [*PLAIN], 0, 8, 256)
        assert param[3].isnan()
        assert param[256:].isfinite().all()
        assert states[1].isnan().tolist() == states[3].isnan().tolist() == [True, False]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_nearest(bits):
    """The look-up says what a search among the bounds does, at the bounds themselves too."""
    maps = state_levels(bits)
    bounds = state_bounds(maps.levels)
    for at in range(2):
        near = torch.cat([bounds[at], maps.levels[at]])
        values = torch.cat(
            [
                near,
                near.nextafter(torch.tensor(2.0)),
                near.nextafter(torch.tensor(-2.0)),
                torch.rand(9999) * 2 - 1,
            ]
        )
        values = values.clamp_min(0.0) if at == 1 else values
        assert torch.equal(maps.codes(at, values).long(), torch.bucketize(values, bounds[at]))


def test_a_second_moment_above_zero_stays_so():
    maps = state_levels(8)
    assert maps.codes(1, torch.tensor([0.0, 1e-30, 1e-7])).tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (64, 64), (200, 7), (0, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_to_int8(kernel_set, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    found, wanted = torch.ops.kbit.round_tensor(weight), training.round_tensor(weight)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_matrix_of_nothing_and_one_that_is_no_number(kernel_set):
    for value, scale in (
        (0.0, 0.0),
        (1e-40, 0.0),
        (float("inf"), float("nan")),
        (float("nan"), float("nan")),
    ):
        for made in (torch.ops.kbit.round_tensor, training.round_tensor):
            codes, turned, found = made(torch.full((3, 5), value))
            assert not codes.any()
            assert not turned.any()
            torch.testing.assert_close(found, torch.tensor([scale]), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [torch.zeros(5, dtype=torch.float64)]}, "parameter 0 is"),
        ({"params": [torch.zeros(10)[::2]]}, "not contiguous"),
        ({"grads": [torch.zeros(4)]}, "gradient 0 has shape"),
        ({"grads": []}, "expected a gradient"),
        ({"states": [torch.zeros(5)] * 4}, "state 0 is"),
        ({"states": [torch.zeros(5, dtype=torch.uint8)] * 4}, "scales of state 0"),
        ({"numbers": [0.0]}, "10 numbers"),
        ({"rule": 3}, "no rule 3"),
        ({"bits": 5}, "states of 5 bits"),
        ({"block": 3}, "a block of 3"),
        ({"block": 8192}, "a block of 8192"),
        ({"levels": torch.zeros(2, 16)}, "levels of states"),
        ({"cells": torch.zeros(2, 16, dtype=torch.int32)}, "cells of states"),
    ],
)
def test_what_does_not_fit_is_an_error(kernel_set, change, message):
    maps = state_levels(8)
    given = {
        "levels": maps.levels,
        "cells": maps.cells,
        "params": [torch.zeros(5)],
        "grads": [torch.zeros(5)],
        "states": list(empty_states(5, 8, Rule.ADAM, 256)),
        "numbers": [*PLAIN],
        "rule": 0,
        "bits": 8,
        "block": 256,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.optimizer_step(**(given | change))


@pytest.mark.parametrize("op", ["optimizer_step", "update_squares", "round_tensor"])
def test_opcheck(kernel_set, op):
    maps, states = state_levels(8), list(empty_states(300, 8, Rule.ADAM, 256))
    arguments = {
        "optimizer_step": (*maps, [torch.randn(300)], [torch.randn(300)], states, [*PLAIN], 0, 8, 256),
        "update_squares": (*maps, torch.randn(300), *states[2:], [*PLAIN], 8, 256),
        "round_tensor": (torch.randn(5, 9),),
    }[op]
    torch.library.opcheck(getattr(torch.ops.kbit, op).default, arguments)
