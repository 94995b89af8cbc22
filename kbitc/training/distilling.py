"""The optimisation loop: what minimises the divergence from the teacher, judged by held-out windows.

The one thing to know: the result is the best that held-out windows have seen, the start among them, so that
it is never worse there than what was packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kbitc.graph.context import Progress, silent
from kbitc.tensor.cores import alone
from kbitc.training.adam import Adam, cosine
from kbitc.training.classroom import Classroom, Key, Lesson, Tuned
from kbitc.training.tunable import BLOCKS, CODEBOOK, OUTLIERS, ROWS, SCALES, VALUE, ZEROS

SEED = 0
ROUNDS = 1
RATES = dict.fromkeys((ROWS, BLOCKS, SCALES, ZEROS, CODEBOOK, OUTLIERS, VALUE), 1e-3)
"""SmolLM2-135M at 3 bits, held-out divergence 0.2747: after 10 steps 0.2626 at 5e-4, 0.3185 at 2e-3.
At 3.5 bits, 1e-3 takes 0.1403 to 0.1327 in 56 steps."""


LOWERED = 0.25
"""Times the rates where those did not gain: what is near its source already wants smaller steps.
SmolLM2-135M at 4.25 bits, held-out divergence 0.0392: 1e-3 never gets below it."""


@dataclass(frozen=True)
class Recipe:
    """How to tune.

    Attributes:
        windows: to learn from.
        steps: of the optimiser.
        batch: windows a step.
        rates: of each kind of value (`kbitc.training.tunable`), at its highest; what has none is not tuned.
        looks: at the held-out windows, evenly spread over the steps.
        patience: looks without a gain after which the rates are lowered, for what is left of the steps.
        flips: rounds of moving single codes after that (`kbitc.training.flips`).
        share: of all codes that a round may move.
        refining: steps of tuning after each round.
    """

    windows: int = 96
    steps: int = 56
    batch: int = 2
    rates: Mapping[str, float] = field(default_factory=lambda: dict(RATES))
    looks: int = 4
    patience: int = 2
    flips: int = 0
    share: float = 0.005
    refining: int = 8


def recipe(**asked: Any) -> Recipe:
    """The usual recipe, with what was asked for instead; None is not asked for."""
    return Recipe(**{name: value for name, value in asked.items() if value is not None})


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes:
        tuned: the best values.
        loss: their divergence on held-out windows, in nats.
        steps: that were taken.
    """

    tuned: Tuned
    loss: float
    steps: int


def held_out(room: Classroom, tuned: Tuned, lessons: Sequence[Lesson]) -> float:
    """The mean divergence of held-out windows, in nats."""
    return sum(room.losses(room.stored(tuned), lessons)) / len(lessons)


def distill(
    room: Classroom,
    how: Recipe,
    lessons: Sequence[Lesson],
    held: Sequence[Lesson],
    start: Outcome,
    on_progress: Progress = silent,
) -> Outcome:
    """Tune.

    Args:
        room: of the student.
        how: the how.
        lessons: windows to learn from.
        held: windows to judge by.
        start: what is known so far.
        on_progress: told of each step, and of the best divergence so far.
    """
    tuned: Mapping[Key, Tensor] = {key: value for key, value in start.tuned.items() if key[1] in how.rates}
    fixed = {key: value for key, value in start.tuned.items() if key not in tuned}
    adam, best, late, step = Adam(), start, 0, 0
    first, height = 0, 1.0  # of the rates' way down
    order = _order(len(lessons), how.steps * how.batch)
    looks = {-(-how.steps * (i + 1) // how.looks) for i in range(how.looks)}
    for step in range(1, how.steps + 1):
        picked = [lessons[i] for i in order[(step - 1) * how.batch : step * how.batch]]
        _, gradients = room.gradients(room.stored({**fixed, **tuned}), tuned, picked)
        share = height * cosine(step - 1 - first, how.steps - first, how.steps // 20)
        rates = {what: rate * share for what, rate in how.rates.items()}
        tuned = alone(partial(adam.step, tuned, gradients, rates))
        if step in looks:
            loss = held_out(room, {**fixed, **tuned}, held)
            late = 0 if loss < best.loss else late + 1
            best = Outcome({**fixed, **tuned}, loss, start.steps + step) if loss < best.loss else best
        on_progress(f"tuning, held-out divergence {best.loss:.4g}", step, how.steps)
        # At a high rate the divergence may rise at first, and fall below its start later.
        if late >= how.patience and 2 * step >= how.steps and height == 1.0:
            tuned = {key: best.tuned[key] for key in tuned}
            adam, first, height = Adam(), step, LOWERED
    return Outcome(best.tuned, best.loss, start.steps + step)


def _order(count: int, total: int) -> list[int]:
    """Windows in a random order, each as often as any other."""
    generator = torch.Generator().manual_seed(SEED)
    order: list[int] = []
    while len(order) < total:
        order += torch.randperm(count, generator=generator).tolist()
    return order
