"""Run the model on text, or on random inputs, and note for each weight what its errors would cost.

before:  stage CANONICAL
after:   stage CANONICAL, fact "moments": `Moments` by weight name

One forward and one backward pass a window (`kbitc.sensitivity.losses` has the losses). A gradient g of an
output and the input x that met the weight give Fisher's diagonal g² x² for each weight, kept as a product
of a row and a column part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kbitc.errors import UsageError, first_line
from kbitc.graph.context import Calibration
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.passes.canonicalize import traced_on
from kbitc.planning.packable import check_packable
from kbitc.sensitivity.eager import EagerStreamed
from kbitc.sensitivity.losses import positions
from kbitc.sensitivity.moments import (
    CALIBRATION,
    MOMENTS,
    Factor,
    Moments,
    Reach,
    from_tensors,
    squared_sums,
    to_tensors,
)
from kbitc.sensitivity.streaming import TURNED, Keeper, Streamed, expert_slices
from kbitc.system.memory import give_back
from kbitc.tensor.cores import cores

MAGNITUDE = 6.0


@dataclass(frozen=True)
class MeasureMoments:
    """Needs a program whose context has something to measure on.

    Attributes:
        magnitude: from where on an input counts as an outlier; 6 is LLM.int8()'s threshold.
    """

    magnitude: float = MAGNITUDE

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[Fact[Any], ...]] = (MOMENTS, CALIBRATION)

    def run(self, program: Program) -> Program:
        """Raises UsageError where there is nothing to measure on, or nothing to measure."""
        check_packable(program)
        source = program.context.calibration
        if source is None:
            raise UsageError(
                "the pass 'measure_moments' has nothing to measure on; 'kbitc compile --calibrate' gives it "
                "text or random inputs, and leaves the pass out where there are none"
            )
        try:
            moments = self._moments(program, source)
        except _Failed as error:
            label = f"nothing: the model has no graph, and running it on {source.label} failed: {error}"
            return program.with_fact(MOMENTS, {}).with_fact(CALIBRATION, label)
        return program.with_fact(MOMENTS, moments).with_fact(CALIBRATION, source.label)

    def _moments(self, program: Program, source: Calibration) -> Mapping[str, Moments]:
        """Measured, or remembered from an earlier run; what is remembered is of the source's own weights."""
        if program.changes:
            return self._measure(program, source)
        options = f"magnitude {self.magnitude:g}{' without a graph' if program.untraced else ''}"
        return from_tensors(source.remembered(lambda: to_tensors(self._measure(program, source)), options))

    def _measure(self, program: Program, source: Calibration) -> dict[str, Moments]:
        feeds = source.feeds()
        traced = traced_on(source, feeds[0])
        read = program.as_stored(source.read)
        eager = EagerStreamed(program, source.skeleton(), read) if traced.untraced else None

        def one(job: tuple[int, dict[str, Any]]) -> _Notes:
            notes = _Notes(program, self.magnitude)
            streamed = Streamed(traced, read, notes.watch) if eager is None else eager.watched_by(notes.watch)
            with torch.enable_grad():
                outputs = _outputs(streamed, job[1])
                loss = source.loss(job[1], outputs, job[0])
                notes.tokens = positions(outputs)
                del outputs  # logits are large
                loss.backward()
            return notes

        every = _Notes(program, self.magnitude)
        # Inputs side by side, one core each; a model that runs itself is one, and takes one after another.
        made = cores().map(one, enumerate(feeds)) if eager is None else map(one, enumerate(feeds))
        for i, notes in enumerate(made):
            every.add(notes)
            program.context.on_progress("measuring what errors cost", i + 1, len(feeds))
            give_back()
        return every.moments(is_text=source.is_text)


class _Failed(Exception):
    """A model without a graph cannot be run either; the message says why."""


def _outputs(streamed: Streamed | EagerStreamed, feed: Mapping[str, Tensor]) -> list[Any]:
    if isinstance(streamed, Streamed):
        return streamed.call(**feed)
    try:
        return list(streamed.call(**feed))
    except Exception as error:
        raise _Failed(f"{type(error).__name__}: {first_line(error)}") from error


@dataclass
class _Sums:
    """Of one kind of use of one weight; leading dimension: experts, or 1."""

    rows: Tensor  # (lead, rows): squared gradients of the output; of an embedding, times read
    columns: (
        Tensor  # (lead, in): squared inputs, times the squared gradient of their token; squared gradients
    )
    energy: Tensor  # (lead, 1): squared gradients of all outputs of all tokens
    gram: Tensor | None  # (in, in): what `columns` is the diagonal of, where it is wanted

    @staticmethod
    def of(lead: int, rows: int, columns: int, *, is_full: bool) -> _Sums:
        shapes = ((lead, rows), (lead, columns), (lead, 1))
        by_row, by_column, energy = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        gram = torch.zeros(columns, columns, dtype=torch.float64) if is_full else None
        return _Sums(by_row, by_column, energy, gram)

    def merge(self, other: _Sums) -> None:
        """Add those of another input."""
        self.rows += other.rows
        self.columns += other.columns
        self.energy += other.energy
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram

    def add(self, expert: int, x: Tensor, grad: Tensor) -> None:
        """Tokens of a linear: x (tokens, in), grad (tokens, rows)."""
        by_row, energy = squared_sums(grad)
        self.rows[expert] += by_row
        self.columns[expert] += (x.square() * energy).sum(0)
        self.energy[expert] += energy.sum()
        if self.gram is not None:
            self.gram += x.mT @ (x * energy)

    def look_up(self, ids: Tensor, grad: Tensor) -> None:
        """Tokens of an embedding: ids (tokens,), grad (tokens, in)."""
        self.rows[0] += torch.bincount(ids, minlength=self.rows.shape[1])
        self.columns[0] += grad.square().sum(0)
        if self.gram is not None:
            self.gram += grad.mT @ grad


@dataclass
class _Seen:
    """Magnitudes of the inputs of one weight's matmuls."""

    magnitude: float
    peaks: Tensor | float = 0.0  # (in,) once something was seen
    counts: Tensor | float = 0.0  # (in,): tokens that reach the magnitude
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        size = x.abs().flatten(0, -2)
        if len(size):
            self.peaks = size.amax(0).clamp_min(self.peaks)
            self.counts = self.counts + (size >= self.magnitude).sum(0)
            self.tokens += len(size)

    def merge(self, other: _Seen) -> None:
        """Add those of another input."""
        if isinstance(other.peaks, Tensor):
            self.peaks = other.peaks.clamp_min(self.peaks)
            self.counts = self.counts + other.counts
            self.tokens += other.tokens

    def reach(self) -> Reach | None:
        if not isinstance(self.peaks, Tensor) or not isinstance(self.counts, Tensor):
            return None
        return Reach(self.peaks, (self.counts / self.tokens).float(), self.magnitude)


class _Notes:
    """What one input, or all of them, say of every weight."""

    def __init__(self, program: Program, magnitude: float) -> None:
        self.program = program
        self.magnitude = magnitude
        self.sums: dict[str, dict[str, _Sums]] = {name: {} for name in program.weights}
        self.seen: dict[str, _Seen] = {}
        self.tokens = 0
        self.keeper = Keeper()

    def add(self, other: _Notes) -> None:
        """Those of another input."""
        self.tokens += other.tokens
        for name, uses in other.sums.items():
            for kind, sums in uses.items():
                if kind in self.sums[name]:
                    self.sums[name][kind].merge(sums)
                else:
                    self.sums[name][kind] = sums
        for name, seen in other.seen.items():
            self.seen.setdefault(name, _Seen(self.magnitude)).merge(seen)

    def moments(self, *, is_text: bool) -> dict[str, Moments]:
        """Of the weights that the loss depends on."""
        return {
            name: replace(
                _moments(own, self.tokens, is_text=is_text),
                reach=self.seen[name].reach() if name in self.seen else None,
            )
            for name, own in self.sums.items()
            if any(use.rows.any() for use in own.values())  # of the others nothing reaches the loss
        }

    def watch(self, name: str, kind: str, given: Any, out: Tensor) -> None:
        """Note the input of a use, and arrange that its output's gradient is noted in the backward pass."""
        is_turned, kind = kind.startswith(TURNED), kind.removeprefix(TURNED)
        x, *rest = given if isinstance(given, tuple) else (given,)
        if kind != "embedding" and not is_turned:
            self.seen.setdefault(name, _Seen(self.magnitude)).add(x.detach())
        own = self._sums(name, kind, is_turned=is_turned)
        kept = self.keeper.keep_input(x)

        def note(grad: Tensor) -> None:
            grad = grad.detach().flatten(0, -2)
            x = kept.back()
            if kind == "embedding":
                own.look_up(x.flatten(), grad)
            elif kind == "linear":
                own.add(0, x.flatten(0, -2), grad)
            else:
                for expert, tokens in expert_slices(*rest):
                    if tokens.stop > tokens.start:
                        own.add(expert, x[tokens], grad[tokens])

        out.register_hook(note)

    def _sums(self, name: str, kind: str, *, is_turned: bool) -> _Sums:
        weight = self.program.weights[name]
        lead = weight.matrix[0] if len(weight.matrix) == 3 else 1
        sizes = (weight.rows // lead, weight.in_features)
        rows, columns = sizes[::-1] if is_turned else sizes
        is_full = "embedding" in weight.kinds and lead == 1 and not is_turned
        made = _Sums.of(lead, rows, columns, is_full=is_full)
        return self.sums[name].setdefault(TURNED + kind if is_turned else kind, made)


def _moments(uses: dict[str, _Sums], tokens: int, *, is_text: bool) -> Moments:
    factors = []
    for kind, own in uses.items():
        if kind == "embedding":
            often = torch.full_like(own.rows, 1 / own.rows.shape[1])
            if is_text:  # half of the weight on rows that this text does not hold: another text will
                often = (often + own.rows / own.rows.sum()) / 2
            gram = None if own.gram is None else (own.gram / tokens).float()
            factors.append(Factor(_plain(often), _plain(own.columns / tokens), gram))
            continue
        energy = own.energy.clamp_min(1e-300)
        rows, columns = own.rows / tokens, own.columns / energy
        first, second = (columns, rows) if kind.startswith(TURNED) else (rows, columns)
        gram = None if own.gram is None else (own.gram / energy).float()
        factors.append(Factor(_plain(first), _plain(second), gram))
    return Moments(tuple(factors))


def _plain(sums: Tensor) -> Tensor:
    """Float32, without the leading dimension where there are no experts."""
    return (sums if sums.shape[0] > 1 else sums[0]).float()


PASS = MeasureMoments
