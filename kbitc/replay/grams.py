"""Second moments of the inputs at a stop, summed in one order whatever the number of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kbitc.replay.engine import Inputs
from kbitc.replay.stops import added_to
from kbitc.replay.values import Pair
from kbitc.sensitivity.gram import Gram, gram_of
from kbitc.sensitivity.streaming import expert_slices
from kbitc.tensor.cores import cores

WIDTH = 256  # columns of a moment that one core sums at a time; a fixed number, so that sums are the same
PARTS = 8  # that wide inputs are split into
PER_FEATURE = 4  # tokens an input feature below which an expert's moments are taken as uncorrelated

Windows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""``(tokens, in_features)`` pairs of the source's and the packed model's inputs."""


def grams(inputs: Inputs, fitted: Sequence[int], held_out: Sequence[int]) -> tuple[Gram, ...]:
    """One of a linear's inputs, or one of each expert's.

    Args:
        inputs: at a stop.
        fitted: indices of the inputs to sum over.
        held_out: those of ``Gram.held_out``.
    """
    if inputs.stop.kind == "grouped_linear":
        return _of_experts(inputs, fitted, held_out)
    parts = [_gram(_windows(inputs, indices)) for indices in (fitted, held_out) if indices]
    return (_joined(parts),)


def residual(inputs: Inputs, name: str, rows: int, indices: Sequence[int]) -> Tensor | None:
    """``(rows, in_features)``: mean of (r - r^) x^T, r what a weight's output is added to; None of nothing.

    Args:
        inputs: at a stop.
        name: one of its weights.
        rows: of that weight.
        indices: of the inputs to take the mean over.
    """
    (read,) = (read for read in inputs.stop.reads if read.name == name)
    node = added_to(read) if read.kind == "linear" else None
    if node is None or not indices or not isinstance(inputs.value(indices[0], node), Pair):
        return None

    def both(index: int) -> tuple[Tensor, Tensor]:
        pair = inputs.value(index, node)
        lost: Tensor = pair.source - pair.packed
        return lost.flatten(0, -2), inputs.pair(index)[1]

    lost, x = both(indices[0])
    if lost.shape != (len(x), rows):
        return None  # what is added is one for all tokens, or for all rows

    def part(start: int) -> Tensor:
        windows = (both(index) for index in indices)
        return gram_of((lost[:, start : start + WIDTH], x) for lost, x in windows)

    tokens = sum(len(inputs.pair(index)[1]) for index in indices)
    parts = cores().map(part, range(0, rows, WIDTH))
    return torch.cat([(part / tokens).float() for part in parts])


def _joined(parts: Sequence[Gram]) -> Gram:
    first, *rest = parts
    return Gram(first.inputs, first.cross, first.tokens, rest[0] if rest else None)


def _windows(inputs: Inputs, indices: Sequence[int]) -> Windows:
    return lambda: (inputs.pair(index) for index in indices)


def _of_experts(inputs: Inputs, fitted: Sequence[int], held_out: Sequence[int]) -> tuple[Gram, ...]:
    """The models may send a token to different experts, so that there is no cross moment."""

    def of(expert: int, indices: Sequence[int]) -> Gram:
        def windows() -> Iterator[tuple[Tensor, Tensor]]:
            for index in indices:
                _, offsets = inputs.expert_slices(index)
                _, x = inputs.pair(index)
                own = x[expert_slices(offsets)[expert][1]]
                yield own, own

        return _gram(windows)

    count = len(inputs.expert_slices(0)[1])
    both = ([of(expert, indices) for indices in (fitted, held_out) if indices] for expert in range(count))
    return tuple(_joined([_damped(part) for part in parts]) for parts in both)


def _damped(gram: Gram) -> Gram:
    """Without what chance says of pairs of features, where few tokens speak of them."""
    if gram.tokens >= PER_FEATURE * gram.inputs.shape[0]:
        return gram
    return Gram(gram.inputs.diagonal().diag_embed(), None, gram.tokens)


def _gram(windows: Windows) -> Gram:
    x, y = next(windows())
    width, is_one = x.shape[1], x is y
    tokens = sum(len(own) for own, _ in windows())
    # Of wide inputs larger parts, as what waits in a file is read for each of them.
    step = max(WIDTH, -(-width // PARTS // WIDTH) * WIDTH)

    def symmetric(start: int) -> Tensor:
        return gram_of((y[:, start : start + step], y[:, start:]) for _, y in windows())

    def cross(start: int) -> Tensor:
        return gram_of((x[:, start : start + step], y) for x, y in windows())

    starts = range(0, width, step)
    upper = torch.zeros(width, width)
    for start, part in zip(starts, cores().map(symmetric, starts), strict=True):
        upper[start : start + step, start:] = part / max(1, tokens)
    moments = upper.triu() + upper.triu(1).mT
    if is_one:
        return Gram(moments, None, tokens)
    crossed = torch.cat([(part / max(1, tokens)).float() for part in cores().map(cross, starts)])
    return Gram(moments, crossed, tokens)
