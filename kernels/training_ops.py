"""``torch.ops.kbit.*`` of training: schemas, fake kernels, and the reference implementations.

``optimizer_step``  parameters, gradients, states  -> in place           one step, states as codes throughout
``update_squares``  gradient, second moments       -> ()                 the size of an update, to clip it by
``round_tensor``    W (rows, cols)                 -> codes, W.T's, scale  int8 under one scale
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbitc.formats.bit_planes import row_bytes
from kbitc.formats.state_levels import StateLevels
from kbitc.kernels import training
from kbitc.kernels.ops import define_op

MAPS = "Tensor levels, Tensor cells"
"""The part of a schema that is `kbitc.formats.state_levels.StateLevels`."""


def _fake_step(*given: Any) -> None:
    del given


@define_op(
    "optimizer_step",
    f"({MAPS}, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, float[] numbers, int rule, "
    "int bits, int block) -> ()",
    _fake_step,
)
def _optimizer_step(levels: Tensor, cells: Tensor, *rest: Any) -> None:
    params, grads, states, numbers, rule, bits, block = rest
    maps = StateLevels(levels, cells)
    training.optimizer_step(maps, params, grads, states, numbers, training.Rule(rule), bits, block)


def _fake_squares(levels: Tensor, *rest: Any) -> Tensor:
    del rest
    return levels.new_empty((), dtype=torch.float64)


@define_op(
    "update_squares",
    f"({MAPS}, Tensor grad, Tensor codes, Tensor scales, float[] numbers, int bits, int block) -> Tensor",
    _fake_squares,
)
def _update_squares(
    levels: Tensor,
    cells: Tensor,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    numbers: Sequence[float],
    bits: int,
    block: int,
) -> Tensor:
    maps = StateLevels(levels, cells)
    return training.update_squares(maps, grad, codes, scales, numbers, bits, block)


def _fake_round(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    codes = weight.new_empty(rows, row_bytes(cols, 8), dtype=torch.uint8)
    return (
        codes,
        weight.new_empty(cols, row_bytes(rows, 8), dtype=torch.uint8),
        weight.new_empty(1, dtype=torch.float32),
    )


@define_op("round_tensor", "(Tensor weight) -> (Tensor codes, Tensor turned, Tensor scale)", _fake_round)
def _round_tensor(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return training.round_tensor(weight)
