"""Losses that `kbitc eval` measured, kept beside an artifact for its report.

The one thing to know: a record stands by itself: it carries the loss of the model it was compared with, so
that its increase needs no other record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitc.errors import UsageError

EVAL_FILE = "kbit_eval.json"  # in an artifact


@dataclass(frozen=True)
class Measured:
    """One result of `kbitc eval`.

    Attributes:
        model: what was evaluated, as the user named it.
        text: name of the text.
        context: tokens a window.
        tokens: tokens that were predicted.
        bits: stored bits per parameter.
        loss: nats per token.
        reference_loss: the same of the model it was compared with, if any.
        divergence: KL divergence from that model, nats per token, if any.
    """

    model: str
    text: str
    context: int
    tokens: int
    bits: float
    loss: float
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


def read_records(path: Path) -> list[Measured]:
    """Records of a file: one object of ``kbitc eval --json``, or a list of them.

    Raises:
        UsageError: not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [_record(entry) for entry in (data if isinstance(data, list) else [data])]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: not a result of 'kbitc eval --json' ({type(error).__name__}: {error})"
        ) from error


def keep_record(folder: Path, entry: Mapping[str, Any]) -> None:
    """Keep a result beside its artifact; one of the same text and windows is replaced.

    Raises:
        UsageError: the folder cannot be written, or holds a damaged file of records.
    """
    path = folder / EVAL_FILE
    kept: list[Any] = []
    if path.exists():
        read_records(path)
        kept = [old for old in json.loads(path.read_text(encoding="utf-8")) if _place(old) != _place(entry)]
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps([*kept, dict(entry)], indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def of_artifact(folder: Path, others: Sequence[Path] = ()) -> list[Measured]:
    """What is recorded beside an artifact, and in other files."""
    own = [folder / EVAL_FILE] if (folder / EVAL_FILE).exists() else []
    return [entry for path in (*own, *others) for entry in read_records(path)]


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["text"], entry["context"], entry["tokens"]


def _record(entry: Mapping[str, Any]) -> Measured:
    def number(key: str) -> float | None:
        return None if entry.get(key) is None else float(entry[key])

    return Measured(
        str(entry["model"]),
        str(entry.get("text", "")),
        int(entry["context"]),
        int(entry["tokens"]),
        float(entry["bits_per_param"]),
        float(entry["loss"]),
        number("reference_loss"),
        number("kl_divergence"),
    )
