"""`kbitc tune`: an artifact made better without a change of format.

The one thing to know: the student runs on what would be stored, so what held-out windows say is of the
artifact that is written, and where they say that nothing was gained, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.plan_file import Tuning
from kbitc.artifact.reader import Artifact
from kbitc.artifact.replacing import write_replaced
from kbitc.artifact.stored import stored_tensors
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibration_text import is_language_model
from kbitc.compiler.calibrator import AUTO, Calibrate, Calibrator, make_calibrator
from kbitc.errors import UsageError
from kbitc.graph.context import Progress, ReadTensor, silent
from kbitc.graph.example_inputs import is_pretrained
from kbitc.system import files
from kbitc.training.classroom import Classroom, Feed, Lesson, Stored, Tuned, teach
from kbitc.training.distilling import Outcome, Recipe, distill, held_out
from kbitc.training.flips import flip
from kbitc.training.preparing import check_source, classroom, traced

HELD = 8
"""Windows at the end of the calibration that are never learned from."""


@dataclass(frozen=True)
class Result:
    """What tuning did.

    Attributes:
        out: the artifact; as it was where ``after`` is not below ``before``.
        tuning: what its plan file says.
        seconds: wall time.
    """

    out: Path
    tuning: Tuning
    seconds: float

    @property
    def is_better(self) -> bool:
        """Whether held-out windows say that something was gained."""
        return self.tuning.after < self.tuning.before

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output of tune."""
        return {
            "out": str(self.out),
            "is_better": self.is_better,
            **self.tuning.to_json(),
            "seconds": round(self.seconds, 3),
        }


def tune_to(
    artifact: str | Path,
    source: str | Path | nn.Module | None = None,
    *,
    out: Path | None = None,
    calibrate: Calibrate = AUTO,
    recipe: Recipe | None = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    is_forced: bool = False,
    claim: FolderClaim | None = None,
    on_progress: Progress = silent,
) -> Result:
    """Tune an artifact, in its place or into another folder.

    Args:
        artifact: folder of a compiled model.
        source: what it was compiled from; where nothing is said, what the artifact recorded.
        out: folder to write; by default the artifact's own, which stays as it was where nothing is gained.
        calibrate: what to tune on, as in compiling; "auto" is "self" for a language model and "random" for
            another of transformers.
        recipe: how.
        example_inputs: to trace and run the model on, where they are more than text.
        is_forced: replace an existing ``out``.
        claim: on ``out``, by a caller who holds it already.
        on_progress: told of long work.

    Raises:
        UsageError: bad arguments, a source that is another or cannot be traced, nothing to calibrate on, too
            few windows, or a folder that cannot be written.
        SourceError: the artifact or the source cannot be read.
    """
    started = perf_counter()
    recipe = Recipe() if recipe is None else recipe
    target = Path(artifact) if out is None else out
    opened = Artifact.open(Path(artifact))
    with (
        nullcontext(claim)
        if claim is not None
        else FolderClaim(target, is_forced=is_forced or out is None) as held,
        open_checkpoint(recorded_source(opened) if source is None else source) as checkpoint,
    ):
        check_source(opened, checkpoint)
        calibrator = make_calibrator(
            checkpoint, calibrate, on_progress, is_wanted=True, example_inputs=example_inputs
        )
        if calibrator is None:
            raise UsageError("--calibrate none: tuning needs something to run on: self, random or a text")
        feeds = _others(calibrator.feeds(2 * (recipe.windows + HELD)), recipe.windows + HELD)
        if len(feeds) <= HELD:
            raise UsageError(
                f"--calibrate {calibrate}: gives {len(feeds)} windows, of which {HELD} are held "
                "out; give a longer text"
            )
        program = traced(calibrator, feeds[0])
        lessons = teach(
            program,
            calibrator.read,
            feeds,
            classes=_classes(calibrator),
            is_text=calibrator.is_text and is_language_model(checkpoint.skeleton()),
            on_progress=on_progress,
        )
        room = classroom(opened, calibrator, program)
        before, last, outcome, flips = _tuned(room, recipe, lessons, calibrator.read, on_progress)
        tuning = Tuning(
            _label(calibrator, len(lessons)),
            before,
            outcome.loss,
            len(lessons) - HELD,
            outcome.steps,
            _counts(outcome.tuned),
            flips,
        )
        if out is not None or outcome.loss < before:
            changed = changes(room, last.stored(outcome.tuned))
            write_replaced(opened, changed, replace(opened.plan, tuning=tuning), held, on_progress)
    return Result(target, tuning, perf_counter() - started)


def _others(feeds: Sequence[Feed], count: int) -> Sequence[Feed]:
    """``count`` of twice as many, mostly others than those that compiling may have fitted codes to.

    From those little is left to learn. Inputs lie evenly spread over a text, and compiling takes fewer,
    so that some may meet. Of a shorter text, the first.
    """
    return feeds[1::2] if len(feeds) >= 2 * count else feeds[:count]


def recorded_source(artifact: Artifact) -> str:
    """The model that an artifact was compiled from, where its plan file's name of it leads there.

    Raises:
        UsageError: it does not: the file holds no paths.
    """
    name = artifact.plan.source
    beside = artifact.folder.absolute().parent / name
    if name == "demo" or files.exists(Path(name)):
        return name
    if files.exists(beside):
        return str(beside)
    raise UsageError(
        f"{artifact.folder}: was compiled from '{name}', which is not in this folder; give the model that "
        "it was compiled from with --source"
    )


def _tuned(
    room: Classroom, recipe: Recipe, lessons: list[Lesson], source: ReadTensor, on_progress: Progress
) -> tuple[float, Classroom, Outcome, int]:
    """The divergence before, and what came of tuning: the student, its values, and how many codes moved."""
    learned, held = lessons[:-HELD], lessons[-HELD:]
    start = room.start()
    before = held_out(room, start, held)
    outcome = distill(room, recipe, learned, held, Outcome(start, before, 0), on_progress)
    after = replace(recipe, steps=recipe.refining, looks=1)
    count = 0
    for _ in range(recipe.flips):
        room, outcome, moved = flip(room, outcome, learned, held, source, recipe.share, on_progress)
        if not moved:
            break
        count += moved
        outcome = distill(room, after, learned, held, outcome, on_progress)
    return before, room, outcome, count


def changes(room: Classroom, stored: Stored) -> dict[str, Tensor]:
    """The tensors that are others than they were, by stored name."""
    changed: dict[str, Tensor] = {}
    for name, packed in stored.packed.items():
        was = stored_tensors(room.weights[name].packed)
        for field, tensor in stored_tensors(packed).items():
            if not _is_same(tensor, was[field]):
                changed[f"{name}.{field}"] = tensor
    plain = {name: t for name, t in stored.plain.items() if not _is_same(t, room.plain[name].stored)}
    return changed | plain


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _counts(tuned: Tuned) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for (_, what), value in tuned.items():
        counts[what] = counts.get(what, 0) + (value.numel() if bool(value.any()) else 0)
    return counts


def _classes(calibrator: Calibrator) -> int | None:
    """The size of the vocabulary of a model of transformers: outputs of so many features are logits."""
    model: Any = calibrator.checkpoint.skeleton()
    return getattr(model.config.get_text_config(), "vocab_size", None) if is_pretrained(model) else None


def _label(calibrator: Calibrator, count: int) -> str:
    source = calibrator.source
    if isinstance(source, Tensor):
        return calibrator.label
    if not calibrator.is_text:
        return f"{count} random inputs"
    return f"{count} windows " + (
        "that the model sampled itself" if source == "self" else f"of {Path(source).name}"
    )
