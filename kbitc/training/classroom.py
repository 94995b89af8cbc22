"""Teacher and student side by side: what one window of the calibration says of a set of tuned values.

The one thing to know: a window is worked on by one thread alone, and sums over windows are taken in their
order, so that neither the number of threads nor their luck shows in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc.formats.dequantize import dequantize
from kbitc.formats.packed import Packed
from kbitc.graph.context import Progress, ReadTensor, silent
from kbitc.graph.program import Program
from kbitc.replay.engine import Outputs, Replay
from kbitc.replay.stops import stops
from kbitc.sensitivity.streaming import finite
from kbitc.system.memory import give_back
from kbitc.tensor.cores import cores, side_by_side
from kbitc.training.divergence import Target, divergence, pooled, targets
from kbitc.training.student import Sink, Student
from kbitc.training.tunable import TunablePlain, TunableWeight

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
    """

    program: Program
    read: ReadTensor
    weights: Mapping[str, TunableWeight]
    plain: Mapping[str, TunablePlain]

    def start(self) -> dict[Key, Tensor]:
        """Zeros for all that may be tuned."""
        each: dict[str, TunableWeight | TunablePlain] = {**self.weights, **self.plain}
        return {(name, what): zero for name, own in each.items() for what, zero in own.start().items()}

    def stored(self, tuned: Tuned) -> Stored:
        """The tensors that values stand for."""
        own = _by_name(tuned)
        packed = side_by_side(lambda name: self.weights[name].tuned(own.get(name, {})), self.weights)
        plain = side_by_side(lambda name: self.plain[name].tuned(own.get(name, {})), self.plain)
        return Stored(dict(zip(self.weights, packed, strict=True)), dict(zip(self.plain, plain, strict=True)))

    def losses(
        self, stored: Stored, lessons: Sequence[Lesson], on_progress: Progress = silent
    ) -> list[float]:
        """The divergence of each window, in nats."""

        def read(name: str) -> Tensor:
            if name in stored.packed:
                return self.program.weights[name].turned_back(dequantize(stored.packed[name]))
            return stored.plain[name] if name in stored.plain else self.read(name)

        found = {}

        def judge(index: int, outputs: list[Any], _: list[Any]) -> None:
            found[index] = float(divergence(outputs, lessons[index].kept))

        feeds = [lesson.feed for lesson in lessons]
        _replay(self.program, read, feeds, judge, "held-out windows", on_progress)
        return [found[index] for index in range(len(lessons))]

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
        for loss, found in cores().map(one, lessons):
            total += loss
            for key, grad in found.items():
                sums[key] = sums[key] + grad if key in sums else grad
        return total / len(lessons), {key: grad / len(lessons) for key, grad in sums.items()}

    def backward(
        self, stored: Stored, lesson: Lesson, sink: Sink | None = None, loss_of: LossOf = divergence
    ) -> tuple[float, Sink]:
        """The divergence of one window, or another loss, and what its backward pass leaves; on one core."""
        sink = Sink() if sink is None else sink
        student = Student(self.program, self.read, stored.packed, stored.plain, sink)
        with torch.enable_grad():
            loss = loss_of(student.call(**lesson.feed), lesson.kept)
            student.backward(loss)
        return float(loss.detach()), sink


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
        classes: see `kbitc.training.divergence.targets`.
        is_text: whether the model is a causal language model, whose inputs are ids.
        on_progress: told of each window.

    Raises:
        UsageError: no output can be compared, or a parameter is not finite.
    """
    found: dict[int, list[Target]] = {}

    def keep(index: int, outputs: list[Any], _: list[Any]) -> None:
        shape = tuple(feeds[index]["input_ids"].shape) if is_text else None
        found[index] = targets(outputs, classes, shape)

    _replay(program, finite(program, read), feeds, keep, "asking the 16-bit model", on_progress)
    kept = pooled([found[index] for index in range(len(feeds))])
    return [Lesson(feed, own) for feed, own in zip(feeds, kept, strict=True)]


def _replay(
    program: Program, read: ReadTensor, feeds: Sequence[Feed], end: Outputs, what: str, on_progress: Progress
) -> None:
    """Run one model on all windows, a weight at a time."""
    total = len(stops(program)) + 1
    with torch.no_grad():
        for done, _ in enumerate(Replay(program, read, feeds).run(end, range(len(feeds)))):
            on_progress(what, done, total)
    give_back()
    on_progress(what, total, total)
