"""Zero-shot accuracies of a study: which examples, how a job is scored on them, and what its row keeps.

The one thing to know: a row keeps every example's outcome, so that two jobs are compared example by example;
and accuracies are compared where examples, shots and the draw of shots are the same, as `Tasks.label` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from kbitc.errors import UsageError
from kbitc.evaluation.harness import SEED, check_tasks, score_tasks
from kbitc.evaluation.intervals import mean_of_tasks
from kbitc.evaluation.opening import Loaded
from kbitc.evaluation.task_files import TASKS, task_path, task_rows
from kbitc.system.checksums import digest, digest_of_file

Hits = Mapping[str, Sequence[int]]
"""By task, 1 for each example that was right and 0 for the others, in the order of the file."""


@dataclass(frozen=True)
class Tasks:
    """The examples that every job of a study is scored on.

    Attributes:
        names: of tasks, as in `kbitc.evaluation.task_files.TASKS`.
        data: folder of their files.
        shots: solved examples before each one.
        limit: the first examples of each task only; None for all.
    """

    names: Sequence[str]
    data: Path
    shots: int = 0
    limit: int | None = None

    def check(self) -> None:
        """See that every task can run, before a model is opened.

        Raises:
            UsageError: an unknown task, a missing or malformed file, or too few examples for the shots.
            BackendUnavailable: lm-eval is not installed.
        """
        check_tasks(self.ordered, self.data, self.shots)

    @property
    def ordered(self) -> list[str]:
        """The names in one order, whatever the user's was; unknown ones last."""
        known = list(TASKS)
        return sorted(self.names, key=lambda name: known.index(name) if name in known else len(known))

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Examples of each task that are scored."""
        lengths = {name: len(task_rows(name, self.data)) for name in self.ordered}
        return {name: min(length, self.limit or length) for name, length in lengths.items()}

    @cached_property
    def label(self) -> str:
        """Which examples: two rows of one label have the same ones.

        "copa[100] piqa[200], 0 shots, 1f0e9a3c": the end is of the files' contents and the draw of shots.
        """
        files = [digest_of_file(task_path(name, self.data)) for name in self.ordered]
        counted = " ".join(f"{name}[{count}]" for name, count in self.counts.items())
        return f"{counted}, {self.shots} shots, {digest(' '.join([*files, str(SEED)]).encode())[:8]}"

    @cached_property
    def version(self) -> str:
        """Of lm-evaluation-harness, which makes the prompts."""
        from importlib.metadata import version

        return version("lm_eval")

    def identity(self) -> list[str]:
        """What decides a job's accuracies beside its model."""
        return [self.label, self.version]

    def score(self, model: nn.Module, tokenizer: Any, label: str) -> Hits:
        """The outcome of every example.

        Args:
            model: a causal language model, as a job has treated it.
            tokenizer: its own.
            label: of the model, for messages.

        Raises:
            UsageError: a model that the harness cannot run.
        """
        loaded = Loaded(model, 0, 0.0, tokenizer)
        scores = score_tasks(loaded, self.ordered, self.data, label=label, shots=self.shots, limit=self.limit)
        return {score.task: list(score.hits) for score in scores}


def accuracy_of(hits: Sequence[int]) -> float:
    """Share of the examples that were right."""
    return sum(hits) / len(hits)


def mean_accuracy(hits: Hits) -> tuple[float | None, float | None]:
    """The mean over tasks, each counted once, and its standard error; None where it cannot be said.

    >>> mean_accuracy({"a": [1, 1], "b": [0, 1, 0, 1]})
    (0.75, 0.14433756729740643)
    """
    if not hits:
        return None, None
    return mean_of_tasks(list(hits.values()))


def parse_tasks(text: str, data: Path, shots: int, limit: int | None) -> Tasks | None:
    """Of ``--tasks``, ``--data``, ``--shots`` and ``--limit``; None where no tasks are asked for.

    Raises:
        UsageError: shots or a limit without tasks.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names:
        return Tasks(tuple(names), data, shots, limit)
    if shots or limit is not None:
        option = "--shots" if shots else "--limit"
        raise UsageError(
            f"{option}: is of zero-shot tasks, and none is named; add --tasks lambada_openai,piqa"
        )
    return None
