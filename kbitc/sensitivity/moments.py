"""What the data says about each weight: second moments of its inputs and of the loss's gradients.

The one thing to know: a `Factor` says what a squared error of one weight costs, as a product of a part
for its row and a part for its column; with gradients, half their product with the squared error is the
increase of the loss in nats per token (a diagonal, separable Fisher: "(g_y * dy)^2" summed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kbitc.graph.facts import Fact

TILE = 2**20  # gradients that are squared at a time


@dataclass(frozen=True)
class Factor:
    """One use of a weight ``(*lead, rows, in_features)``.

    Attributes:
        rows: ``(*lead, rows)`` float32: mean squared gradient of the output; for an embedding, how often
            each row is read.
        columns: ``(*lead, in_features)`` float32: mean squared input, each token weighted by its squared
            gradient; for an embedding, mean squared gradient of the feature.
        gram: ``(in_features, in_features)`` float32 whose diagonal ``columns`` is; of weights that are read
            as rows, which no stop of a replay shows (`kbitc.replay.stops`). None of others.
    """

    rows: Tensor
    columns: Tensor
    gram: Tensor | None = None


@dataclass(frozen=True)
class Reach:
    """How far the values of each input feature of a matmul go.

    Attributes:
        peaks: ``(in_features,)`` float32: largest magnitude.
        positions: ``(in_features,)`` float32: share of the tokens with a magnitude of at least ``magnitude``.
        magnitude: from where on a value counts as an outlier.
    """

    peaks: Tensor
    positions: Tensor
    magnitude: float


@dataclass(frozen=True)
class Moments:
    """All uses of one weight.

    Attributes:
        factors: one a use; tied weights have several.
        reach: of the inputs of all uses, experts together; None for an embedding alone.
    """

    factors: tuple[Factor, ...]
    reach: Reach | None = None

    @staticmethod
    def of_importance(importance: Tensor) -> Moments:
        """Moments that say nothing but how much each input feature matters, ``(*lead, in_features)``."""
        rows = torch.ones(*importance.shape[:-1], 1)
        return Moments((Factor(rows, importance.detach().float()),))

    def importance(self) -> Tensor:
        """``(*lead, in_features)``: what an error in each input feature costs, for the scale search."""
        return sum(
            (factor.columns * factor.rows.mean(-1, keepdim=True) for factor in self.factors),
            torch.zeros_like(self.factors[0].columns),
        )


MOMENTS: Fact[Mapping[str, Moments]] = Fact("moments")
"""Of the weights that calibration saw, by name."""

CALIBRATION: Fact[str] = Fact("calibration")
"""How reports call what was measured on."""


def to_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Flat, for a safetensors file; see :func:`from_tensors`."""
    flat: dict[str, Tensor] = {}
    for name, own in moments.items():
        for i, factor in enumerate(own.factors):
            flat[f"{name}|{i}.rows"] = factor.rows
            flat[f"{name}|{i}.columns"] = factor.columns
            if factor.gram is not None:
                flat[f"{name}|{i}.gram"] = factor.gram
        if own.reach is not None:
            flat[f"{name}|peaks"] = own.reach.peaks
            flat[f"{name}|positions"] = own.reach.positions
            flat[f"{name}|magnitude"] = torch.tensor(own.reach.magnitude, dtype=torch.float64)
    return {key: value.contiguous() for key, value in flat.items()}


def from_tensors(flat: Mapping[str, Tensor]) -> dict[str, Moments]:
    """The inverse of :func:`to_tensors`.

    >>> one = Moments((Factor(torch.ones(2), torch.ones(3)),))
    >>> from_tensors(to_tensors({"w": one}))["w"].factors[0].columns
    tensor([1., 1., 1.])
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, _, field = key.rpartition("|")
        fields.setdefault(name, {})[field] = value
    return {
        name: Moments(
            tuple(
                Factor(own[f"{i}.rows"], own[f"{i}.columns"], own.get(f"{i}.gram"))
                for i in range(sum(field.endswith(".rows") for field in own))
            ),
            _reach(own),
        )
        for name, own in fields.items()
    }


def _reach(own: Mapping[str, Tensor]) -> Reach | None:
    if "peaks" not in own:
        return None
    return Reach(own["peaks"], own["positions"], float(own["magnitude"]))


def squared_sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squared gradients, a part at a time, as those of logits are large.

    Args:
        grad: ``(tokens, rows)``.

    Returns:
        ``(rows,)`` over tokens, and ``(tokens, 1)`` over rows.
    """
    by_row, by_token = torch.zeros(grad.shape[1], dtype=torch.float64), []
    for part in grad.split(max(1, TILE // max(1, grad.shape[1]))):
        squares = part.square()
        by_row += squares.sum(0)
        by_token.append(squares.sum(-1, keepdim=True))
    return by_row, torch.cat(by_token)
