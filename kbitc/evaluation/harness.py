"""Zero-shot tasks through lm-evaluation-harness: our models behind its Hugging Face class, tasks from files.

The one thing to know: prompts, log-likelihoods and metrics are the harness'; what is ours is how a model is
opened, where examples lie, and the standard errors and paired intervals made of its results item by item.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kbitc.errors import BackendUnavailable, UsageError
from kbitc.evaluation.intervals import Difference, mean_of_tasks, paired, paired_mean, standard_error
from kbitc.evaluation.opening import Loaded
from kbitc.evaluation.task_files import FOLDER, TASKS, task_path, task_rows
from kbitc.graph.context import Progress, silent
from kbitc.system.checksums import digest_of_file

SEED = 1234
"""The harness' own."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    Attributes:
        task: its name.
        hits: 1 for each example that was right, 0 for the others, in the order of the file.
        log_likelihoods: of each example's choices, or of its one continuation, in nats.
        metrics: all that the harness gives, by name.
        cut: prompts that were longer than the model's positions, and were cut at their beginning.
        version: of the definition.
        sha256: of the file of examples.
    """

    task: str
    hits: tuple[int, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]
    metrics: Mapping[str, float]
    cut: int
    version: float
    sha256: str

    @property
    def accuracy(self) -> float:
        """Share of examples that were right."""
        return sum(self.hits) / len(self.hits)

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy, over examples; None of one example."""
        return standard_error(self.hits)

    def to_json(self) -> dict[str, Any]:
        """An entry of ``kbitc eval --json``."""
        return {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "items": len(self.hits),
            "metrics": dict(self.metrics),
            "cut": self.cut,
            "version": self.version,
            "sha256": self.sha256,
            "hits": list(self.hits),
        }


def mean_accuracy(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """The mean over tasks, each counted once, and its standard error (examples of tasks are independent)."""
    return mean_of_tasks([score.hits for score in scores])


def differences(ours: Sequence[TaskScore], theirs: Sequence[TaskScore]) -> dict[str, Difference]:
    """Paired differences of accuracy by task, and that of the mean under "mean".

    Args:
        ours: of a model.
        theirs: of the model it is compared with, on the same examples.
    """
    pairs = [(our.hits, their.hits) for our, their in zip(ours, theirs, strict=True)]
    each = {our.task: paired(*pair) for our, pair in zip(ours, pairs, strict=True)}
    return {**each, "mean": paired_mean(pairs)}


def check_tasks(names: Sequence[str], data: Path, shots: int) -> None:
    """See that every task can run, before a model is opened.

    Raises:
        UsageError: an unknown task, a missing or malformed file, or too few examples for the shots.
        BackendUnavailable: lm-eval is not installed.
    """
    if not names:
        raise UsageError(f"--tasks: names no task; known are {', '.join(TASKS)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--tasks: names {twice} twice; name each task once")
    for name in names:
        count = len(task_rows(name, data))
        if shots >= count:
            raise UsageError(
                f"--shots {shots}: {task_path(name, data)} has {count} examples, and the one that is asked "
                "is none of its own shots; give fewer"
            )
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "--tasks: needs lm-evaluation-harness; install it with: pip install 'kbitc[eval]'"
        ) from error


def score_tasks(
    loaded: Loaded,
    names: Sequence[str],
    data: Path,
    *,
    label: str = "the model",
    shots: int = 0,
    limit: int | None = None,
    seed: int = SEED,
    batch: int = 8,
    on_progress: Progress = silent,
) -> list[TaskScore]:
    """Score a model on tasks.

    Args:
        loaded: a causal language model with its tokenizer.
        names: of tasks, as in `kbitc.evaluation.task_files.TASKS`.
        data: folder of their files.
        label: of the model, for messages.
        shots: solved examples before each one, drawn from the same file.
        limit: the first examples of each file only.
        seed: of the draw of shots.
        batch: examples that run at once.
        on_progress: told of each batch.

    Raises:
        UsageError: as `check_tasks`, which is to be asked first; or no such model.
        SourceError: it has no tokenizer.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from kbitc.evaluation.harness_model import KbitLM

    with _quiet():
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"data": str(data)})
        tasks = manager.load(list(names))
        for task in tasks["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=seed)
        scores = []
        for name, task in tasks["tasks"].items():
            model = KbitLM.of(loaded, label, batch_size=batch, on_progress=partial(_told, on_progress, name))
            found = evaluate(lm=model, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
            scores.append(_score(name, found, model.cut, data))
    return scores


def _told(on_progress: Progress, name: str, _: str, done: int, total: int) -> None:
    on_progress(name, done, total)


def _score(name: str, found: Mapping[str, Any], cut: int, data: Path) -> TaskScore:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
    return TaskScore(
        task=name,
        hits=tuple(int(sample["acc"]) for sample in samples),
        log_likelihoods=tuple(tuple(found for found, _ in sample["filtered_resps"]) for sample in samples),
        metrics={key: float(value) for key, value in metrics.items() if isinstance(value, float)},
        cut=cut,
        version=float(found["versions"][name]),
        sha256=digest_of_file(task_path(name, data)),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness' log and bars off: kbitc has checked what it warns of, and shows a bar of its own."""
    import lm_eval.api.task as tasks

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, tasks.tqdm
    logger.setLevel(logging.ERROR)
    tasks.tqdm = partial(bar, disable=True)  # building prompts asks nobody whether to show a bar
    try:
        yield
    finally:
        tasks.tqdm = bar
        logger.setLevel(level)
