"""Second moments of the inputs at a stop, summed in one order whatever the number of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from kbitc.replay.engine import Inputs
from kbitc.replay.stops import added_to
from kbitc.replay.values import Pair
from kbitc.sensitivity.gram import Gram, gram_of
from kbitc.sensitivity.streaming import expert_slices
from kbitc.tensor.cores import side_by_side

WIDTH = 256  # columns of a moment that one core sums at a time, at most,
PARTS = 8  # but of wide inputs an eighth; numbers that no core counts for, so that sums are the same
PER_FEATURE = 4  # tokens an input feature below which an expert's moments are taken as uncorrelated

Windows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""``(tokens, in_features)`` pairs of the source's and the packed model's inputs."""


def grams(
    inputs: Inputs, fitted: Sequence[int], held_out: Sequence[int], *, is_crossed: bool = True
) -> tuple[Gram, ...]:
    """One of a linear's inputs, or one of each expert's.

    Args:
        inputs: at a stop.
        fitted: indices of the inputs to sum over.
        held_out: those of ``Gram.held_out``.
        is_crossed: with ``Gram.cross``, which otherwise each weight's :func:`pull` makes up for.
    """
    if inputs.stop.kind == "grouped_linear":
        return _of_experts(inputs, fitted, held_out)
    parts = [_windows(inputs, indices) for indices in (fitted, held_out) if indices]
    return (_joined(_grams(parts, is_crossed=is_crossed)),)


def pull(
    inputs: Inputs, name: str, rows: int, indices: Sequence[int], weight: Tensor | None = None
) -> Tensor | None:
    """``(rows, in_features)``: mean of (r - r^) x^T, r what a weight's output is added to; None of nothing.

    Args:
        inputs: at a stop.
        name: one of its weights.
        rows: of that weight.
        indices: of the inputs to take the mean over.
        weight: ``(rows, in_features)`` float32 of the source: with w (x - x^) added to r - r^. Of few rows
            that is cheaper than the cross moment of all pairs of features.
    """
    if not indices:
        return None
    (read,) = (read for read in inputs.stop.reads if read.name == name)
    node = added_to(read) if read.kind == "linear" else None
    if node is not None and not _is_of_each(inputs, node, indices[0], rows):
        node = None
    x, y = inputs.pair(indices[0])
    if x is y:
        weight = None
    if node is None and weight is None:
        return None

    def lost(index: int, strip: slice) -> tuple[Tensor, Tensor]:
        x, y = inputs.pair(index)
        off = None if weight is None else (x - y) @ weight[strip].mT
        if node is not None:
            pair = inputs.value(index, node)
            own = pair.source.flatten(0, -2)[:, strip] - pair.packed.flatten(0, -2)[:, strip]
            off = own if off is None else off.add_(own)
        assert off is not None
        return off, y

    def part(strip: slice) -> Tensor:
        return gram_of(lost(index, strip) for index in indices)

    tokens = sum(len(inputs.pair(index)[1]) for index in indices)
    parts = side_by_side(part, _strips(rows, 2 * -(-rows // (2 * WIDTH))))
    return torch.cat([(part / tokens).float() for part in parts])


def _is_of_each(inputs: Inputs, node: fx.Node, index: int, rows: int) -> bool:
    """Whether a node's value differs between the models, and has an element for each token and row."""
    pair = inputs.value(index, node)
    if not isinstance(pair, Pair):
        return False
    source: Tensor = pair.source
    return source.flatten(0, -2).shape == (len(inputs.pair(index)[1]), rows)


def _strips(width: int, count: int) -> list[slice]:
    """So many of one width, but for the last."""
    step = -(-width // count)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _joined(parts: Sequence[Gram]) -> Gram:
    first, *rest = parts
    return Gram(first.inputs, first.cross, first.tokens, rest[0] if rest else None)


def _windows(inputs: Inputs, indices: Sequence[int]) -> Windows:
    return lambda: (inputs.pair(index) for index in indices)


def _of_experts(inputs: Inputs, fitted: Sequence[int], held_out: Sequence[int]) -> tuple[Gram, ...]:
    """The models may send a token to different experts, so that there is no cross moment."""

    def of(expert: int, indices: Sequence[int]) -> Windows:
        def windows() -> Iterator[tuple[Tensor, Tensor]]:
            for index in indices:
                _, offsets = inputs.expert_slices(index)
                _, x = inputs.pair(index)
                own = x[expert_slices(offsets)[expert][1]]
                yield own, own

        return windows

    count = len(inputs.expert_slices(0)[1])
    both = [indices for indices in (fitted, held_out) if indices]
    every = iter(
        _grams([of(expert, indices) for expert in range(count) for indices in both], is_crossed=False)
    )
    return tuple(_joined([_damped(next(every)) for _ in both]) for _ in range(count))


def _damped(gram: Gram) -> Gram:
    """Without what chance says of pairs of features, where few tokens speak of them."""
    if gram.tokens >= PER_FEATURE * gram.inputs.shape[0]:
        return gram
    return Gram(gram.inputs.diagonal().diag_embed(), None, gram.tokens)


def _grams(parts: Sequence[Windows], *, is_crossed: bool) -> list[Gram]:
    """Of several sets of windows; all that there is to sum is one heap of work for the cores."""
    of_parts = [_Sums.of(windows, is_crossed=is_crossed) for windows in parts]
    jobs = [job for sums in of_parts for job in sums.jobs()]
    found = iter(side_by_side(lambda job: job(), jobs))
    return [sums.joined(found) for sums in of_parts]


@dataclass(frozen=True)
class _Sums:
    """Moments of some windows, a strip of columns of one at a time.

    Attributes:
        windows: of ``(tokens, width)`` inputs.
        width: input features.
        tokens: of all windows.
        is_one: no cross moment: both models have the same inputs, or nobody asks.
    """

    windows: Windows
    width: int
    tokens: int
    is_one: bool

    @staticmethod
    def of(windows: Windows, *, is_crossed: bool) -> _Sums:
        x, y = next(windows())
        tokens = sum(len(own) for own, _ in windows())
        return _Sums(windows, x.shape[1], tokens, x is y or not is_crossed)

    @property
    def strips(self) -> list[slice]:
        """Of one width but the last; of wide inputs few, as what waits in a file is read for each of them."""
        return _strips(self.width, min(PARTS, -(-self.width // WIDTH)))

    def jobs(self) -> list[Callable[[], Tensor]]:
        """The largest first: H from each strip's first column on, and C."""
        kinds = [self._symmetric] if self.is_one else [self._cross, self._symmetric]
        return [partial(kind, strip) for kind in kinds for strip in self.strips]

    def joined(self, found: Iterator[Tensor]) -> Gram:
        """From what the jobs gave, in their order."""
        cross = None if self.is_one else torch.cat([next(found) for _ in self.strips])
        whole = torch.empty(self.width, self.width)
        for strip in self.strips:
            own = next(found)
            inner = own[:, : len(own)]
            inner.copy_(inner.triu() + inner.triu(1).mT)
            whole[strip, strip.start :] = own
            whole[strip.stop :, strip] = own[:, len(own) :].mT
        return Gram(whole, cross, self.tokens)

    def _cross(self, strip: slice) -> Tensor:
        return self._mean((x[:, strip], y) for x, y in self.windows())

    def _symmetric(self, strip: slice) -> Tensor:
        return self._mean((y[:, strip], y[:, strip.start :]) for _, y in self.windows())

    def _mean(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        return (gram_of(pairs) / max(1, self.tokens)).float()
