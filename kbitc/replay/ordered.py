"""Weights packed in the order of the graph, each knowing what the errors of earlier ones did to its inputs.

The one thing to know: whoever iterates keeps what is packed and gives it back by name, so that an interrupted
run goes on with what it has: it replays, and packs what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kbitc.formats.dequantize import dequantize
from kbitc.formats.layout import stored_plain
from kbitc.formats.packed import Packed
from kbitc.graph.program import Program
from kbitc.quantizers import Evidence, settled_quantizer
from kbitc.replay.engine import Inputs, Replay
from kbitc.replay.grams import grams, pull
from kbitc.replay.stops import stops
from kbitc.sensitivity.gram import GRAM, RowGroup, equal_groups, groups_of_moments
from kbitc.sensitivity.moments import MOMENTS
from kbitc.system.memory import give_back

FITTED = 64  # inputs that codes are fitted to
HELD_OUT = 8  # inputs that judge

Known = Callable[[str], Packed | None]
"""A weight that is packed already."""


@dataclass(frozen=True)
class InOrder:
    """A way through a planned model that packs.

    Attributes:
        program: planned, with a source and something to calibrate on.
        traced: the same model, canonical, captured on one of the feeds.
        feeds: the inputs.
        read: of the source, its values as they are to be stored.
        known: what is packed already, by name; asked again after each weight.
    """

    program: Program
    traced: Program
    feeds: Sequence[Mapping[str, Any]]
    read: Callable[[str], Tensor]
    known: Known

    def run(self) -> Iterator[tuple[str, str, Packed]]:
        """Each weight that the plan packs and that is not known: name, quantizer, packed."""
        give_back()  # what pricing has freed; the embedding comes next, and is large
        later = {name for stop in stops(self.traced) for name in stop.names}
        for name in filter(self._is_waiting, self.program.weights):
            if name not in later:
                moments = (self.program.get(MOMENTS) or {}).get(name)
                rows = self.program.weights[name].rows
                yield self._packed(name, None if moments is None else groups_of_moments(moments, rows))
                give_back()
        replay = Replay(self.traced, self.read, self.feeds, self._dequantized)
        for inputs in replay.run(wanted=self._is_waiting):
            yield from self._at(inputs)

    @property
    def fitted(self) -> list[int]:
        """Indices of the inputs that codes are fitted to."""
        held = set(self.held_out)
        return [i for i in range(len(self.feeds)) if i not in held]

    @property
    def held_out(self) -> list[int]:
        """Indices of the others, evenly spread."""
        count = min(HELD_OUT, len(self.feeds) // 4)
        return [(2 * i + 1) * len(self.feeds) // (2 * count) for i in range(count)]

    def _at(self, inputs: Inputs) -> Iterator[tuple[str, str, Packed]]:
        weights = {name: self.program.weights[name] for name in inputs.stop.names if self._is_waiting(name)}
        width = inputs.pair(0)[0].shape[1]
        # Of few rows, as those of a down projection, the products with the weight itself are cheaper.
        is_crossed = sum(weight.rows for weight in weights.values()) >= width
        own = grams(inputs, self.fitted, self.held_out, is_crossed=is_crossed)
        for name, weight in weights.items():
            groups = equal_groups(own, weight.rows)
            if len(groups) == 1:
                source = None if is_crossed else weight.oriented(self.read(name)).float()
                fitted, held_out = (
                    pull(inputs, name, weight.rows, indices, source)
                    for indices in (self.fitted, self.held_out)
                )
                groups = (replace(groups[0], residual=fitted, held_out=held_out),)
            yield self._packed(name, groups)

    def _packed(self, name: str, groups: tuple[RowGroup, ...] | None) -> tuple[str, str, Packed]:
        assert self.program.plan is not None
        choice = self.program.plan.weights[name]
        facts = {} if groups is None else {GRAM: groups}
        evidence = Evidence.of(self.program, name, choice.spec).with_facts(facts)
        used, quantizer = settled_quantizer(choice.quantizer, evidence)
        data = self.program.weights[name].oriented(self.read(name))
        return name, used, quantizer.quantize(data, choice.spec, evidence)

    def _is_packed(self, name: str) -> bool:
        assert self.program.plan is not None
        choice = self.program.plan.weights.get(name)
        return choice is not None and not choice.spec.is_left_alone

    def _is_waiting(self, name: str) -> bool:
        return self._is_packed(name) and self.known(name) is None

    def _dequantized(self, name: str) -> Tensor | None:
        packed = self.known(name)
        if packed is not None:
            return dequantize(packed)
        data = self.read(name)
        kept = stored_plain(data)
        return None if kept.dtype == data.dtype else self.program.weights[name].oriented(kept).float()
