"""One evaluation: what was asked for, whether it fits the kind of model, and what came out.

The one thing to know: an option that names something to measure, and says nothing about the model at hand, is
an error, not ignored.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kbitc.backends import make_decoder
from kbitc.checkpoint import demo
from kbitc.errors import UsageError
from kbitc.evaluation import embeddings, harness
from kbitc.evaluation.intervals import Difference, paired, standard_error
from kbitc.evaluation.kinds import Kind
from kbitc.evaluation.losses import LossScore, masked_loss, masked_windows, pairs_loss, read_pairs
from kbitc.evaluation.opening import Loaded, need_tokenizer
from kbitc.evaluation.perplexity import Score, perplexity, read_text, windows
from kbitc.graph.context import Progress, silent
from kbitc.version import VERSION

HELDOUT = "the demo model's held-out text"


@dataclass(frozen=True)
class Asked:
    """What to measure; None is what was not given.

    Attributes:
        text: UTF-8 file.
        context: tokens a window.
        limit_tokens: of the text.
        tasks: names of zero-shot tasks.
        data: folder of their files.
        shots: solved examples before each one.
        limit: examples of a task, pairs, or texts and images.
        seed: of shots and masks.
        batch: examples of tasks that run at once.
        pairs: file of sources and targets.
        images: folder.
        kv: what keys and values are cached as, so that what the cache loses counts in a perplexity.
    """

    text: Path | None = None
    context: int = 512
    limit_tokens: int | None = None
    tasks: tuple[str, ...] | None = None
    data: Path = Path()
    shots: int = 0
    limit: int | None = None
    seed: int = harness.SEED
    batch: int = 8
    pairs: Path | None = None
    images: Path | None = None
    kv: str | None = None

    @property
    def text_label(self) -> str:
        """How results call the text."""
        return HELDOUT if self.text is None else self.text.name

    @property
    def windows_context(self) -> int:
        """Tokens a window: no more than the demo model has, on its own text."""
        return min(self.context, demo.CONTEXT) if self.text is None else self.context

    @property
    def wants_perplexity(self) -> bool:
        """Whether a causal model is scored on a text: where tasks are asked for, only if one is named."""
        return self.tasks is None or self.text is not None

    def read_text(self) -> str:
        """The text, or the demo model's held-out one.

        Raises:
            UsageError: it cannot be read.
        """
        return read_text(demo.heldout() if self.text is None else self.text)

    def check(self) -> None:
        """See that what is named is there, before a model is opened.

        Raises:
            UsageError: a file is missing or malformed, a task unknown.
            BackendUnavailable: a package is missing.
        """
        if self.tasks is not None:
            harness.check_tasks(self.tasks, self.data, self.shots)
        elif self.shots:
            raise UsageError("--shots: is of --tasks; name some, or leave it out")
        if self.text is not None:
            self.read_text()
        if self.pairs is not None:
            read_pairs(self.pairs, self.limit)
        if self.images is not None and not self.images.is_dir():
            raise UsageError(f"--images {self.images}: is no folder")

    def check_kind(self, kind: Kind, label: str, *, has_reference: bool) -> None:
        """See that the options fit a kind of model, and that those it needs are there.

        Raises:
            UsageError: they do not; names the option.
        """
        given = {
            "--text": self.text is not None,
            "--limit-tokens": self.limit_tokens is not None,
            "--tasks": self.tasks is not None,
            "--limit": self.limit is not None,
            "--pairs": self.pairs is not None,
            "--images": self.images is not None,
            "--kv": self.kv is not None,
            "--against": has_reference,
        }
        fitting = {*_NEEDED[kind], *_TAKEN[kind], "--against"}
        wrong = [option for option, is_given in given.items() if is_given and option not in fitting]
        if wrong:
            raise UsageError(
                f"{wrong[0]}: says nothing about {label}, which is scored as {_article(kind)}; that takes "
                f"{', '.join(sorted(fitting))}"
            )
        missing = [option for option in _NEEDED[kind] if not given[option]]
        if missing:
            raise UsageError(f"{label}: is scored as {_article(kind)}, for which {_NEEDED[kind][missing[0]]}")
        if self.limit is not None and kind == Kind.CAUSAL and self.tasks is None:
            raise UsageError("--limit: is of --tasks here; --limit-tokens takes the first tokens of a text")
        if self.kv is not None and not self.wants_perplexity:
            raise UsageError("--kv: is of perplexities alone; name a --text, or leave it out")


_NEEDED: dict[Kind, dict[str, str]] = {
    Kind.CAUSAL: {},
    Kind.MASKED: {},
    Kind.ENCODER_DECODER: {
        "--pairs": "eval needs --pairs FILE: sources and targets, .jsonl or two columns in .tsv"
    },
    Kind.EMBEDDING: {"--against": "eval needs --against MODEL: the model that it was compiled from"},
    Kind.IMAGE_TEXT: {
        "--against": "eval needs --against MODEL: the model that it was compiled from",
        "--images": "eval needs --images DIR: a folder of two images or more",
        "--text": "eval needs --text FILE: a text a line, descriptions of such images",
    },
}
_TAKEN: dict[Kind, tuple[str, ...]] = {
    Kind.CAUSAL: ("--text", "--limit-tokens", "--tasks", "--limit", "--kv"),
    Kind.MASKED: ("--text", "--limit-tokens"),
    Kind.ENCODER_DECODER: ("--limit",),
    Kind.EMBEDDING: ("--text", "--limit"),
    Kind.IMAGE_TEXT: ("--limit",),
}


def _article(kind: Kind) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


@dataclass(frozen=True)
class Scored:
    """What came out; None is what was not measured.

    Attributes:
        kind: what the model is scored as.
        text: of a causal model.
        loss: of a masked model, or of an encoder-decoder.
        texts: embeddings of texts.
        images: embeddings of images.
        pooling: of an embedding model.
        tasks: of a causal model.
        reference_tasks: those of the model it is compared with.
    """

    kind: Kind
    text: Score | None = None
    loss: LossScore | None = None
    texts: embeddings.Agreement | None = None
    images: embeddings.Agreement | None = None
    pooling: str | None = None
    tasks: Sequence[harness.TaskScore] = ()
    reference_tasks: Sequence[harness.TaskScore] = ()

    @property
    def loss_difference(self) -> Difference | None:
        """Of losses, this model's minus the other's, in nats per token, paired by item."""
        if self.loss is not None:
            return self.loss.difference
        if self.text is None or not self.text.reference_window_losses:
            return None
        return paired(self.text.window_losses, self.text.reference_window_losses)

    @property
    def task_differences(self) -> Mapping[str, Difference]:
        """Of accuracies, by task and for their mean; empty without another model."""
        return harness.differences(self.tasks, self.reference_tasks) if self.reference_tasks else {}

    def to_json(self, asked: Asked) -> dict[str, Any]:
        """All of it, with what was asked for and the versions that measured it."""
        entry: dict[str, Any] = {"kind": self.kind.value}
        if self.text is not None:
            entry["standard_error"] = standard_error(self.text.window_losses)
            entry["windows"] = len(self.text.window_losses)
        if self.kind in (Kind.MASKED, Kind.EMBEDDING, Kind.IMAGE_TEXT):
            entry["text"] = asked.text_label
        if self.loss is not None:
            entry |= self._loss_json(asked)
        if self.loss_difference is not None:
            entry["difference"] = self.loss_difference.to_json()
        if self.tasks:
            entry |= self._tasks_json(asked)
        agreements = {"texts": self.texts, "images": self.images}
        entry |= {name: found.to_json() for name, found in agreements.items() if found is not None}
        if self.pooling is not None:
            entry["pooling"] = self.pooling
        limits = {"limit": asked.limit, "limit_tokens": asked.limit_tokens, "seed": asked.seed}
        return entry | limits | {"versions": versions(bool(self.tasks))}

    def _loss_json(self, asked: Asked) -> dict[str, Any]:
        assert self.loss is not None
        is_masked = self.kind == Kind.MASKED
        entry: dict[str, Any] = (
            {"context": asked.windows_context} if is_masked else {"pairs": str(asked.pairs)}
        )
        entry |= {
            "loss": self.loss.loss,
            "standard_error": self.loss.standard_error,
            "tokens": self.loss.tokens,
            "items": len(self.loss.losses),
            "reference_loss": self.loss.reference_loss,
        }
        return {key: value for key, value in entry.items() if key != "reference_loss" or value is not None}

    def _tasks_json(self, asked: Asked) -> dict[str, Any]:
        entry: dict[str, Any] = {"shots": asked.shots, "data": str(asked.data.absolute())}
        for suffix, scores in (("tasks", self.tasks), ("reference_tasks", self.reference_tasks)):
            if scores:
                mean, error = harness.mean_accuracy(scores)
                entry[suffix] = {score.task: score.to_json() for score in scores}
                entry[suffix.replace("tasks", "mean_accuracy")] = {"mean": mean, "standard_error": error}
        if self.reference_tasks:
            entry["task_differences"] = {k: found.to_json() for k, found in self.task_differences.items()}
        return entry


def versions(with_harness: bool) -> dict[str, str]:
    """Of what a result depends on."""
    names = ("torch", "transformers", *(("lm_eval",) if with_harness else ()))
    return {"kbitc": VERSION, "python": platform.python_version(), **{name: version(name) for name in names}}


@dataclass(frozen=True)
class _Scorer:
    label: str
    loaded: Loaded
    reference: Loaded | None
    asked: Asked
    on_progress: Progress = field(default=silent)

    @property
    def tokenizer(self) -> Any:
        return need_tokenizer(self.loaded, self.label)

    @property
    def other(self) -> Any:
        return None if self.reference is None else self.reference.model

    def causal(self, result: Scored) -> Scored:
        asked = self.asked
        if asked.wants_perplexity:
            ids = windows(
                self.loaded.model,
                self.tokenizer,
                asked.read_text(),
                asked.windows_context,
                asked.limit_tokens,
            )
            decoder = None if asked.kv is None else make_decoder(self.loaded.model, kv=asked.kv)
            text = perplexity(
                self.loaded.model,
                ids,
                reference=self.other,
                decoder=decoder,
                on_progress=self.on_progress,
            )
            result = replace(result, text=text)
        if asked.tasks is None:
            return result
        ours = self._tasks(self.loaded, self.label)
        theirs = () if self.reference is None else self._tasks(self.reference, "the model of --against")
        return replace(result, tasks=ours, reference_tasks=theirs)

    def _tasks(self, loaded: Loaded, label: str) -> Sequence[harness.TaskScore]:
        asked = self.asked
        assert asked.tasks is not None
        return harness.score_tasks(
            loaded,
            asked.tasks,
            asked.data,
            label=label,
            shots=asked.shots,
            limit=asked.limit,
            seed=asked.seed,
            batch=asked.batch,
            on_progress=self.on_progress,
        )

    def masked(self, result: Scored) -> Scored:
        asked = self.asked
        items = masked_windows(
            self.loaded.model,
            self.tokenizer,
            asked.read_text(),
            context=asked.windows_context,
            limit=asked.limit_tokens,
            seed=asked.seed,
        )
        loss = masked_loss(self.loaded.model, items, reference=self.other, on_progress=self.on_progress)
        return replace(result, loss=loss)

    def encoder_decoder(self, result: Scored) -> Scored:
        assert self.asked.pairs is not None
        pairs = read_pairs(self.asked.pairs, self.asked.limit)
        loss = pairs_loss(
            self.loaded.model, self.tokenizer, pairs, reference=self.other, on_progress=self.on_progress
        )
        return replace(result, loss=loss)

    def embedding(self, result: Scored) -> Scored:
        lines = embeddings.read_lines(self.asked.read_text(), "--text", self.asked.limit)
        with tempfile.TemporaryDirectory(prefix="kbitc-") as scratch:
            pooling = embeddings.pooling_of(embeddings.companions_folder(self.label, Path(scratch)))
        texts = embeddings.text_agreement(
            self.loaded.model,
            self.other,
            self.tokenizer,
            lines,
            pooling=pooling,
            on_progress=self.on_progress,
        )
        return replace(result, texts=texts, pooling=pooling)

    def image_text(self, result: Scored) -> Scored:
        assert self.asked.images is not None
        lines = embeddings.read_lines(self.asked.read_text(), "--text", self.asked.limit)
        images = embeddings.read_images(self.asked.images, self.asked.limit)
        with tempfile.TemporaryDirectory(prefix="kbitc-") as scratch:
            processor = embeddings.image_processor(embeddings.companions_folder(self.label, Path(scratch)))
        found = embeddings.image_text_agreement(
            self.loaded.model, self.other, self.tokenizer, processor, lines, images, self.on_progress
        )
        return replace(result, texts=found.texts, images=found.images)


def score(
    label: str,
    kind: Kind,
    loaded: Loaded,
    reference: Loaded | None,
    asked: Asked,
    on_progress: Progress = silent,
) -> Scored:
    """Measure a model.

    Args:
        label: as the user named it.
        kind: of `kbitc.evaluation.kinds.kind_of`.
        loaded: the model.
        reference: of the same kind, to compare with.
        asked: what `Asked.check_kind` has let pass.
        on_progress: told of the work.

    Raises:
        UsageError: a text, window or pair does not fit the model.
        SourceError: the model has no tokenizer or processor, or not its own.
    """
    scorer = _Scorer(label, loaded, reference, asked, on_progress)
    measure = {
        Kind.CAUSAL: scorer.causal,
        Kind.MASKED: scorer.masked,
        Kind.ENCODER_DECODER: scorer.encoder_decoder,
        Kind.EMBEDDING: scorer.embedding,
        Kind.IMAGE_TEXT: scorer.image_text,
    }
    return measure[kind](Scored(kind))
