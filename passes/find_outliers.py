"""Find the input features whose values, or whose makers' weights, stand out from all others.

before:  stage CANONICAL, fact "moments" if there was text to measure on
after:   stage CANONICAL, fact "outliers": `kbitc.sensitivity.outliers.OutlierFeatures` by weight name

With text, LLM.int8()'s criterion (2208.07339, section 4.1): |x| >= 6 somewhere in at least 25 % of the
layers, and at 6 % of all their positions. A weight's layers are the weights at the same place of every layer,
and it keeps those of the found features that reach 6 in its own input. Without text, the k-bit paper's proxy
(2212.09720, section 4): the standard deviation of the weights of each output unit of the *previous* layer
ranks the next weight's input features; those more than four standard deviations above the mean are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage, Weight
from kbitc.graph.queries import previous_weights, same_roles
from kbitc.sensitivity.moments import MOMENTS, Reach
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures


@dataclass(frozen=True)
class FindOutliers:
    """Costs nothing where moments were measured; without them, every weight is read once.

    Attributes:
        layers: least share of the layers in which a feature reaches the magnitude (6, unless
            ``measure_moments`` was told another).
        positions: least share of the positions of all layers.
        deviations: without text, standard deviations above the mean.
    """

    layers: float = 0.25
    positions: float = 0.06
    deviations: float = 4.0

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[Fact[Any], ...]] = (OUTLIERS,)

    def run(self, program: Program) -> Program:
        """Raises UsageError for a program with neither moments nor a source of weights."""
        moments = program.get(MOMENTS) or {}
        reaches = {name: own.reach for name, own in moments.items() if own.reach is not None}
        features = self._on_text(program, reaches) if moments else self._on_weights(program)
        return program.with_fact(OUTLIERS, {name: features.get(name, _EMBEDDING) for name in program.weights})

    def _on_text(self, program: Program, reaches: Mapping[str, Reach]) -> dict[str, OutlierFeatures]:
        roles = same_roles(program)
        alone = set(program.weights).difference(*roles)
        features: dict[str, OutlierFeatures] = {}
        for names in [*roles, *((name,) for name in program.weights if name in alone)]:
            group = [reaches[name] for name in names if name in reaches]
            if not group:
                continue
            layers = torch.stack([own.peaks >= own.magnitude for own in group]).float().mean(0)
            positions = torch.stack([own.positions for own in group]).mean(0)
            is_outlier = (layers > 0) & (layers >= self.layers) & (positions >= self.positions)
            features |= {
                name: self._of_reach(reaches[name], is_outlier, layers, positions, len(group))
                for name in names
                if name in reaches
            }
        return features

    def _of_reach(
        self, own: Reach, is_outlier: Tensor, layers: Tensor, positions: Tensor, count: int
    ) -> OutlierFeatures:
        picked = is_outlier & (own.peaks >= own.magnitude)
        index = picked.nonzero().flatten()
        figures = {
            "magnitude": _floats(own.peaks[index]),
            "layers": _floats(layers[index]),
            "positions": _floats(positions[index]),
        }
        ranking = _ranked(picked, own.positions, own.peaks)
        of = f"of {count} layers" if count > 1 else "of its layer"
        if len(index):
            reason = (
                f"|x| >= {own.magnitude:g} in {_range(layers[index])} {of} and at "
                f"{_range(positions[index])} of positions"
            )
        else:
            top = int(own.peaks.argmax())
            reason = f"none: the largest |x| is {float(own.peaks[top]):.3g}, of feature {top}"
            if own.peaks[top] >= own.magnitude:
                reason += (
                    f", which reaches {own.magnitude:g} in {_range(layers[[top]])} {of} and at "
                    f"{_range(positions[[top]])} of positions (needed: {self.layers:.0%} and "
                    f"{self.positions:.0%})"
                )
        return OutlierFeatures(tuple(index.tolist()), figures, reason, ranking)

    def _on_weights(self, program: Program) -> dict[str, OutlierFeatures]:
        if program.read is None:
            raise UsageError(
                "the pass 'find_outliers' has neither text nor weights to look at; give the program a source "
                "of weights, or run 'measure_moments' before it"
            )
        before = previous_weights(program)
        known: dict[tuple[str, str], Tensor] = {}
        features = {}
        wanted = [weight for weight in program.weights.values() if weight.kinds != ("embedding",)]
        for i, weight in enumerate(wanted, start=1):
            source = before.get(weight.name)
            key = (weight.name, "own") if source is None else source
            if key not in known:
                known[key] = _deviation(program.weights[key[0]], program.read(key[0]), key[1])
            features[weight.name] = self._of_deviation(known[key], source)
            program.context.on_progress(f"finding outliers {weight.name}", i, len(wanted))
        return features

    def _of_deviation(self, deviation: Tensor, source: tuple[str, str] | None) -> OutlierFeatures:
        spread = deviation.std(correction=0).clamp_min(1e-30)
        score = (deviation - deviation.mean()) / spread
        picked = score > self.deviations
        index = picked.nonzero().flatten()
        whose = (
            "its own input columns (no layer before it has as many output units)"
            if source is None
            else f"the output units of {source[0]}"
        )
        top = float(score.max())
        reason = f"the weights of {whose} deviate by "
        reason += f"up to {top:.1f} sigma more than the mean"
        if not len(index):
            reason = f"none: {reason} (needed: {self.deviations:g})"
        return OutlierFeatures(
            tuple(index.tolist()), {"deviation": _floats(score[index])}, reason, _ranked(picked, score)
        )


_EMBEDDING = OutlierFeatures(reason="none: read as an embedding, which has no input features")


def _deviation(weight: Weight, data: Tensor, side: str) -> Tensor:
    """Standard deviation of each output unit (its row), of each embedded feature, or of each own column."""
    oriented = weight.oriented(data).float()
    if side == "linear":
        if oriented.dim() == 3:  # the same unit of all experts
            oriented = oriented.transpose(0, 1).flatten(1)
        return oriented.std(-1, correction=0)
    return oriented.flatten(0, -2).std(0, correction=0)


def _ranked(*keys: Tensor) -> Tensor:
    """Indices by the first key, largest first, then by the second and so on, then by position."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[torch.sort(key[order].double(), descending=True, stable=True).indices]
    return order


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _range(shares: Sequence[float] | Tensor) -> str:
    low, high = f"{float(min(shares)):.1%}", f"{float(max(shares)):.1%}"
    short = [text.replace(".0%", "").rstrip("%") for text in (low, high)]
    return f"{short[0]} %" if short[0] == short[1] else f"{short[0]} to {short[1]} %"


PASS = FindOutliers
