"""Prices of options under error feedback, which changes what a format costs, and so which one wins.

The one thing to know: the source model is replayed alone, so that the second moments of each weight's inputs
are at hand in turn; sampled rows of the weight are rounded against them, under the options that the table's
own prices make worth a look.

    cost = 1/2 sum over rows of E[g²] * (q - w) H (q - w)^T        in nats per token

with the mean squared gradient g of each row's output from `kbitc.sensitivity.moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kbitc.formats.dequantize import dequantize
from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec
from kbitc.graph.program import Program
from kbitc.planning.knapsack import Item
from kbitc.planning.knapsack.hulls import hull
from kbitc.quantizers import Quantizer
from kbitc.replay.engine import Replay
from kbitc.replay.grams import grams
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.gram import GRAM, Gram, RowGroup, equal_groups, groups_of_moments
from kbitc.sensitivity.moments import MOMENTS, Moments
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures
from kbitc.sensitivity.sampled_error import PRICED, relative_error, sample_rows
from kbitc.sensitivity.score_table import Option, monotone
from kbitc.tensor.cores import side_by_side

PER_BITS = 2  # of the options of one number of bits, how many beside the hull's are tried
CLOSE_BITS = 5  # up to here; above it formats hardly differ, and the hull's are enough

Options = tuple[Option, ...]


@dataclass(frozen=True)
class Pricing:
    """A way through a model that prices.

    Attributes:
        program: canonical, with moments and a source.
        traced: the same model, captured on one of the feeds.
        feeds: the inputs.
        read: of the source, its values as they are to be stored.
        quantizer: that will pack the weights.
    """

    program: Program
    traced: Program
    feeds: Sequence[Mapping[str, Any]]
    read: Callable[[str], Tensor]
    quantizer: Quantizer

    def run(self, tables: Mapping[str, Options]) -> dict[str, Options]:
        """The tables with new prices, of the options worth a look alone; others' as they were."""
        made = dict(tables)
        done = 0
        for names, groups_of in self._weights():
            tried = [
                (sample, option)
                for name in names
                if name in self._moments and (sample := self._sample(name, groups_of(name))) is not None
                for option in _worthwhile(tables[name], self.program.weights[name].numel)
            ]
            found: dict[str, list[Option]] = {}
            for (sample, _), option in zip(tried, side_by_side(_option, tried), strict=True):
                found.setdefault(sample.name, []).append(option)
            made.update((name, monotone(tuple(own))) for name, own in found.items())
            done += len(names)
            self.program.context.on_progress("pricing with error feedback", done, len(tables))
        return made

    @cached_property
    def _estimating(self) -> Quantizer:
        make: Callable[[], Quantizer] | None = getattr(self.quantizer, "estimating", None)
        return self.quantizer if make is None else make()

    @property
    def _moments(self) -> Mapping[str, Moments]:
        return self.program.get(MOMENTS) or {}

    def _weights(self) -> Iterator[tuple[Sequence[str], Callable[[str], tuple[RowGroup, ...] | None]]]:
        """Weights that are priced at one time, and their rows' moments."""
        replay = Replay(self.traced, self.read, self.feeds)
        seen: set[str] = set()
        for inputs in replay.run():
            own = grams(inputs, range(len(self.feeds)), ())
            names = [name for name in inputs.stop.names if name in self.program.weights]
            seen.update(names)
            yield names, partial(self._of_grams, own)
        rest = [name for name in self.program.weights if name not in seen]
        yield rest, self._of_moments

    def _of_grams(self, own: tuple[Gram, ...], name: str) -> tuple[RowGroup, ...]:
        return equal_groups(own, self.program.weights[name].rows)

    def _of_moments(self, name: str) -> tuple[RowGroup, ...] | None:
        moments = self._moments.get(name)
        return None if moments is None else groups_of_moments(moments, self.program.weights[name].rows)

    def _sample(self, name: str, groups: tuple[RowGroup, ...] | None) -> _Sample | None:
        if groups is None:
            return None
        weight, moments = self.program.weights[name], self._moments[name]
        flat = weight.oriented(self.read(name)).flatten(0, -2)
        picked = sample_rows(flat.shape[0], flat.shape[1], PRICED)
        every = moments.factors[0].rows.flatten().double()
        rows = every[picked] * float(every.sum() / every[picked].sum().clamp_min(1e-300))
        features = (self.program.get(OUTLIERS) or {}).get(name, OutlierFeatures())
        own = _restricted(groups, picked)
        return _Sample(name, flat[picked].float(), rows, own, features, self._estimating)


@dataclass(frozen=True)
class _Sample:
    """Rows of a weight; ``rows`` are their mean squared gradients, scaled to stand for all rows."""

    name: str
    values: Tensor
    rows: Tensor
    groups: tuple[RowGroup, ...]
    features: OutlierFeatures
    quantizer: Quantizer

    def option(self, option: Option) -> Option:
        """The same with the price and the error of what the quantizer makes of it."""
        if option.spec.is_left_alone:
            return option
        back = dequantize(self._packed(option.spec))
        cost = 0.0
        for group in self.groups:
            error = self.values[group.rows] - back[group.rows]
            lost = ((error @ group.gram.inputs) * error).double().sum(-1)
            cost += float(lost @ self.rows[group.rows])
        return replace(option, cost=cost / 2, error=relative_error(self.values, back))

    def _packed(self, spec: Spec) -> Packed:
        evidence = Evidence("a sample", self.features.picked(spec), {GRAM: self.groups})
        return self.quantizer.quantize(self.values, spec, evidence)


def _option(tried: tuple[_Sample, Option]) -> Option:
    sample, option = tried
    return sample.option(option)


def _restricted(groups: Sequence[RowGroup], picked: Tensor) -> tuple[RowGroup, ...]:
    """Groups of some rows, by their places among those."""
    own = (RowGroup(torch.isin(picked, group.rows).nonzero()[:, 0], group.gram) for group in groups)
    return tuple(group for group in own if len(group.rows))


def _worthwhile(options: Options, numel: int) -> list[Option]:
    """The hull of bytes and cost, and the best of each number of bits, where a bit is worth a factor of 4."""
    kept = set(hull([Item(option.nbytes, option.cost) for option in options]))
    by_bits: dict[int, list[int]] = {}

    def worth(i: int) -> float:
        return options[i].cost * float(4 ** (8 * options[i].nbytes / numel))

    for i in sorted(range(len(options)), key=worth):
        option = options[i]
        if not option.spec.is_left_alone and option.spec.bits <= CLOSE_BITS:
            by_bits.setdefault(option.spec.bits, []).append(i)
    for own in by_bits.values():
        kept.update(own[:PER_BITS])
    return [options[i] for i in sorted(kept)]
