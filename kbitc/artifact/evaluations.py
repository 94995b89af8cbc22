"""`Evaluation`: one result of ``kbitc eval``, as it is printed, kept beside an artifact, and reported.

The one thing to know: it stands by itself: it carries the loss of the model that it was compared with, so
that its increase needs no other result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbitc.errors import SourceError, UsageError
from kbitc.system import files
from kbitc.system.json_file import read_any_json, well_formed

EVAL_FILE = "kbit_eval.json"  # in an artifact


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a text.

    Attributes:
        model: what was evaluated, as the user named it.
        text: name of the text.
        context: tokens a window.
        tokens: tokens that were predicted.
        bits_per_param: stored bits per parameter.
        nbytes: of its stored tensors; None in files of versions that did not write it.
        loss: nats per token.
        activations: of the linears: "float" or "int8".
        kv: what keys and values were cached as, where they were; see ``kbitc eval --kv``.
        float_activations: why weights went on with floats although int8 was asked for, by name.
        reference_loss: the loss of the model it was compared with, if any.
        divergence: KL divergence from that model, nats per token, if any.
    """

    model: str
    text: str
    context: int
    tokens: int
    bits_per_param: float
    loss: float
    nbytes: int | None = None
    activations: str = "float"
    kv: str | None = None
    float_activations: Mapping[str, str] = field(default_factory=dict)
    reference_loss: float | None = None
    divergence: float | None = None

    @property
    def increase(self) -> float | None:
        """Nats per token above the reference."""
        return None if self.reference_loss is None else self.loss - self.reference_loss

    @property
    def perplexity(self) -> float:
        """Exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output of eval, and an entry of the file."""
        entry: dict[str, Any] = {
            "model": self.model,
            "text": self.text,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "tokens": self.tokens,
            "context": self.context,
            "bits_per_param": self.bits_per_param,
            "bytes": self.nbytes,
            "activations": self.activations,
            "kv": self.kv,
            "float_activations": dict(self.float_activations),
            "kl_divergence": self.divergence,
            "reference_loss": self.reference_loss,
        }
        optional = ("bytes", "kv", "kl_divergence", "reference_loss")
        return {key: value for key, value in entry.items() if key not in optional or value is not None}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: not one.
        """

        def number(key: str) -> float | None:
            return None if entry.get(key) is None else float(entry[key])

        if not isinstance(entry, Mapping):
            raise TypeError(f"{entry!r} is no object")
        nbytes = entry.get("bytes")
        return Evaluation(
            model=str(entry["model"]),
            text=str(entry.get("text", "")),
            context=int(entry["context"]),
            tokens=int(entry["tokens"]),
            bits_per_param=float(entry["bits_per_param"]),
            loss=float(entry["loss"]),
            nbytes=None if nbytes is None else int(nbytes),
            activations=str(entry.get("activations", "float")),
            float_activations={k: str(v) for k, v in entry.get("float_activations", {}).items()},
            kv=None if entry.get("kv") is None else str(entry["kv"]),
            reference_loss=number("reference_loss"),
            divergence=number("kl_divergence"),
        )


def read_evaluations(path: Path) -> list[Evaluation]:
    """Results of a file: one object of ``kbitc eval --json``, or a list of them.

    Raises:
        UsageError: not such a file.
    """
    try:
        data = read_any_json(path)
    except SourceError as error:
        raise UsageError(f"{path}: not a result of 'kbitc eval --json' ({error})") from error
    with well_formed(f"{path}: not a result of 'kbitc eval --json'", "remove it", UsageError):
        return [Evaluation.from_json(entry) for entry in (data if isinstance(data, list) else [data])]


def keep_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Keep a result beside its artifact; one of the same text, windows and cache is replaced.

    Raises:
        UsageError: the folder cannot be written, or holds a damaged file of results.
    """
    path = folder / EVAL_FILE
    try:
        lock = files.Lock.take(folder / f".{EVAL_FILE}.lock", waits=True)  # another result may come at once
        try:
            known = read_evaluations(path) if path.exists() else []
            kept = [old for old in known if _place(old) != _place(evaluation)]
            entries = [entry.to_json() for entry in (*kept, evaluation)]
            files.write_whole(path, json.dumps(entries, indent=1) + "\n")
        finally:
            files.remove(lock.path)
            lock.release()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def evaluations_of(folder: Path, others: Sequence[Path] = ()) -> list[Evaluation]:
    """What is kept beside an artifact, and in other files."""
    own = [folder / EVAL_FILE] if (folder / EVAL_FILE).exists() else []
    return [entry for path in (*own, *others) for entry in read_evaluations(path)]


def _place(evaluation: Evaluation) -> tuple[Any, ...]:
    return evaluation.text, evaluation.context, evaluation.tokens, evaluation.kv
