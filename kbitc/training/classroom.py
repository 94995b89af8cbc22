"""Teacher and student side by side: what one window of the calibration says of a set of tuned values.

The one thing to know: a window is worked on by one thread alone, and sums over windows are taken in their
order, so that neither the number of threads nor their luck shows in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.graph.context import Progress, ReadTensor, silent
from kbitc.graph.program import Program
from kbitc.sensitivity.streaming import Streamed
from kbitc.training.divergence import Target, divergence, pooled, targets
from kbitc.training.student import Sink, Student
from kbitc.training.tunable import TunablePlain, TunableWeight

T = TypeVar("T")

Key: TypeAlias = tuple[str, str]
"""Name of a tensor, and what is tuned of it."""

Tuned: TypeAlias = Mapping[Key, Tensor]
"""Changes relative to what was packed, see `kbitc.training.tunable`."""

LossOf: TypeAlias = Callable[[Sequence[Any], Sequence[Target]], Tensor]
"""Of a student's outputs, and what is kept of its teacher's."""

Feed: TypeAlias = Mapping[str, Any]
"""Keyword inputs of the model."""


@dataclass(frozen=True)
class Lesson:
    """One window, and what the teacher says of it."""

    feed: Feed
    kept: Sequence[Target]


@dataclass(frozen=True)
class Stored:
    """A student's tensors as they would be stored."""

    packed: Mapping[str, Packed]
    plain: Mapping[str, Tensor]


@dataclass(frozen=True)
class Classroom:
    """Runs students.

    Attributes:
        program: canonical.
        read: tensors that are not tuned, by name.
        weights: packed ones by name.
        plain: those of one dimension that are not packed, by name.
        pool: of threads that work alone.
    """

    program: Program
    read: ReadTensor
    weights: Mapping[str, TunableWeight]
    plain: Mapping[str, TunablePlain]
    pool: Executor

    def start(self) -> dict[Key, Tensor]:
        """Zeros for all that may be tuned."""
        each: dict[str, TunableWeight | TunablePlain] = {**self.weights, **self.plain}
        return {(name, what): zero for name, own in each.items() for what, zero in own.start().items()}

    def stored(self, tuned: Tuned) -> Stored:
        """The tensors that values stand for."""
        own = _by_name(tuned)
        packed = self.each(lambda name: self.weights[name].tuned(own.get(name, {})), self.weights)
        plain = self.each(lambda name: self.plain[name].tuned(own.get(name, {})), self.plain)
        return Stored(dict(zip(self.weights, packed, strict=True)), dict(zip(self.plain, plain, strict=True)))

    def losses(
        self, stored: Stored, lessons: Sequence[Lesson], on_progress: Progress = silent
    ) -> list[float]:
        """The divergence of each window, in nats."""

        def loss(lesson: Lesson) -> float:
            with torch.no_grad():
                student = Student(self.program, self.read, stored.packed, stored.plain)
                return float(divergence(student.call(**lesson.feed), lesson.kept))

        found = []
        for value in self.pool.map(loss, lessons):
            found.append(value)
            on_progress("held-out windows", len(found), len(lessons))
        return found

    def gradients(
        self, stored: Stored, tuned: Tuned, lessons: Sequence[Lesson]
    ) -> tuple[float, dict[Key, Tensor]]:
        """The mean divergence of some windows, and its gradients by the tuned values."""
        own = _by_name(tuned)

        def one(lesson: Lesson) -> tuple[float, dict[Key, Tensor]]:
            loss, sink = self.backward(stored, lesson)
            found: dict[Key, Tensor] = {}
            for name in own.keys() & sink.sums.keys():
                found |= _keyed(name, self.weights[name].gradients(sink.sums[name], own[name]))
            for name in own.keys() & sink.whole.keys():
                found |= _keyed(name, self.plain[name].gradients(sink.whole[name], own[name]))
            return loss, found

        total = 0.0
        sums: dict[Key, Tensor] = {}
        for loss, found in self.pool.map(one, lessons):
            total += loss
            for key, grad in found.items():
                sums[key] = sums[key] + grad if key in sums else grad
        return total / len(lessons), {key: grad / len(lessons) for key, grad in sums.items()}

    def backward(
        self, stored: Stored, lesson: Lesson, sink: Sink | None = None, loss_of: LossOf = divergence
    ) -> tuple[float, Sink]:
        """The divergence of one window, or another loss, and what its backward pass leaves.

        In a thread of the pool.
        """
        sink = Sink() if sink is None else sink
        student = Student(self.program, self.read, stored.packed, stored.plain, sink)
        with torch.enable_grad():
            loss = loss_of(student.call(**lesson.feed), lesson.kept)
            student.backward(loss)
        return float(loss.detach()), sink

    def each(self, function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """A function of each item, in threads that work alone."""
        return list(self.pool.map(function, items))

    def alone(self, function: Callable[..., T], *args: Any) -> T:
        """One call, in a thread that works alone."""
        return self.pool.submit(function, *args).result()


def _by_name(tuned: Tuned) -> dict[str, dict[str, Tensor]]:
    own: dict[str, dict[str, Tensor]] = {}
    for (name, what), value in tuned.items():
        own.setdefault(name, {})[what] = value
    return own


def _keyed(name: str, values: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    return {(name, what): value for what, value in values.items()}


def teach(
    program: Program,
    read: ReadTensor,
    feeds: Sequence[Feed],
    pool: Executor,
    *,
    classes: int | None = None,
    is_text: bool = False,
    on_progress: Progress = silent,
) -> list[Lesson]:
    """Run the teacher on every window, and keep of its outputs what a student is compared with.

    Args:
        program: canonical, of the source.
        read: a tensor of the source by name.
        feeds: keyword inputs.
        pool: of threads that work alone.
        classes: see `kbitc.training.divergence.targets`.
        is_text: whether the model is a causal language model, whose inputs are ids.
        on_progress: told of each window.

    Raises:
        UsageError: no output can be compared, or a parameter is not finite.
    """

    def lesson(feed: Feed) -> Lesson:
        with torch.no_grad():
            outputs = Streamed(program, read).call(**feed)
            shape = tuple(feed["input_ids"].shape) if is_text else None
            return Lesson(feed, targets(outputs, classes, shape))

    lessons = []
    for made in pool.map(lesson, feeds):
        lessons.append(made)
        on_progress("asking the 16-bit model", len(lessons), len(feeds))
    kept = pooled([lesson.kept for lesson in lessons])
    return [replace(lesson, kept=own) for lesson, own in zip(lessons, kept, strict=True)]
