"""How far a student's outputs are from its teacher's: one number a position, and what is kept to say it.

The one thing to know: of logits the teacher's `TOP` largest are kept and the mass of all others as one more
outcome, which bounds the Kullback-Leibler divergence from below and misses little of it. An output that is no
distribution counts as the mean of a normal law as wide as the output's own root mean square, shared by its
features, as in `kbitc.sensitivity.losses`: half a relative squared error is then the divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.sensitivity.losses import log_probabilities

TOP = 64
LEAST_MASS = 1e-6  # of float32 probabilities whose sum is subtracted from 1


@dataclass(frozen=True)
class Logits:
    """A teacher's logits, in short.

    Attributes:
        at: which output they are.
        ids: ``(positions, top)`` int32, the most probable outcomes.
        logs: the same shape, float32: their log-probabilities.
        classes: outcomes of each position.
    """

    at: int
    ids: Tensor
    logs: Tensor
    classes: int

    @staticmethod
    def of(at: int, logits: Tensor, top: int = TOP) -> Logits:
        """From logits ``(..., classes)``."""
        flat = logits.float().reshape(-1, logits.shape[-1])
        values, ids = flat.topk(min(top, flat.shape[-1]), dim=-1)
        return Logits(at, ids.int(), values - flat.logsumexp(-1, keepdim=True), flat.shape[-1])

    @property
    def positions(self) -> int:
        """Distributions."""
        return len(self.ids)

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(teacher, student), in nats, summed over positions."""
        flat = logits.float().reshape(self.positions, -1)
        logs = log_probabilities(flat, self.ids.long())
        own = self.logs.exp()
        total = (own * (self.logs - logs)).sum()
        if self.ids.shape[-1] == flat.shape[-1]:
            return total
        mass = _rest(own)
        return total + (mass * (mass.log() - _rest(logs.exp()).log())).sum()


def _rest(probabilities: Tensor) -> Tensor:
    return (1.0 - probabilities.sum(-1)).clamp_min(LEAST_MASS)


@dataclass(frozen=True)
class Values:
    """A teacher's output that is no distribution.

    Attributes:
        at: which output it is.
        values: float32, as it is.
        square: the mean square of that output, over all windows.
    """

    at: int
    values: Tensor
    square: float

    @staticmethod
    def of(at: int, values: Tensor) -> Values:
        """From an output of one window."""
        kept = values.detach().float().clone()
        return Values(at, kept, float(kept.square().mean()))

    @property
    def positions(self) -> int:
        """Vectors of features."""
        return self.values.numel() // self.values.shape[-1]

    def divergence(self, values: Tensor) -> Tensor:
        """Half the squared error relative to the mean square, a mean over features, a sum over positions."""
        width = max(self.square, 1e-30) * self.values.shape[-1]
        return (values.float() - self.values).square().sum() / (2 * width)


Target = Logits | Values


def targets(outputs: Sequence[Any], classes: int | None, is_causal: tuple[int, ...] | None) -> list[Target]:
    """What to keep of a teacher's outputs.

    Args:
        outputs: flat.
        classes: outputs of so many features are logits, and then no other output counts; None for none.
        is_causal: ``(1, length)`` of the ids of a causal language model, whose first output of that shape and
            one dimension more is its logits; None for other models.

    Raises:
        UsageError: there is nothing to compare.
    """
    floats = [(i, v) for i, v in enumerate(outputs) if isinstance(v, Tensor) and v.is_floating_point()]
    if is_causal is not None:
        floats = [(i, v) for i, v in floats if v.dim() == 3 and v.shape[:2] == is_causal][:1]
        kept: list[Target] = [Logits.of(i, v) for i, v in floats]
    else:
        kept = [Logits.of(i, v) for i, v in floats if v.dim() and v.shape[-1] == classes]
        kept = kept or [Values.of(i, v) for i, v in floats if v.dim()]
    if not kept:
        raise UsageError(
            "none of the model's outputs can be compared with another model's; there is nothing to tune"
        )
    return kept


def pooled(windows: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """The same, each output as wide as it is over all windows: of one alone it may be next to nothing."""
    squares = [
        math.fsum(target.square for target in same if isinstance(target, Values)) / len(windows)
        for same in zip(*windows, strict=True)
    ]
    return [
        [replace(t, square=s) if isinstance(t, Values) else t for t, s in zip(kept, squares, strict=True)]
        for kept in windows
    ]


def divergence(outputs: Sequence[Any], kept: Sequence[Target]) -> Tensor:
    """Of a student's outputs from its teacher's, a mean over positions, summed over outputs, in nats.

    Args:
        outputs: of the student, flat, in the order of the teacher's.
        kept: from :func:`targets`.
    """
    parts = [target.divergence(outputs[target.at]) / target.positions for target in kept]
    return torch.stack(parts).sum()
