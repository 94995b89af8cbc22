"""Perplexity, KL divergence and speed of a model, packed or not.

The one thing to know: perplexity is the exponential of the mean negative log-likelihood over tokens
2 ... n of non-overlapping windows; the last partial window is dropped (DESIGN section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.dense import token_ids
from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import UsageError
from kbitc.graph.context import Progress, silent
from kbitc.graph.positions import usable_positions

if TYPE_CHECKING:
    from kbitc.backends import Decoder

BATCH_TOKENS = 2**13
"""Of windows that go through a model together: enough for the overhead of small models not to count."""
BATCH_LOGITS = 2**26
"""Values of their logits at most, 256 MB in float32."""


@dataclass(frozen=True)
class Score:
    """Result of :func:`perplexity`.

    Attributes:
        perplexity: exp of ``loss``.
        loss: mean negative log-likelihood, nats per token.
        tokens: tokens that were predicted.
        divergence: mean KL divergence from the reference model to this one, nats per token.
        reference_loss: the reference model's own loss.
        window_losses: of each window by itself, nats per token; windows are equally long.
        reference_window_losses: the reference model's.
    """

    perplexity: float
    loss: float
    tokens: int
    divergence: float | None = None
    reference_loss: float | None = None
    window_losses: tuple[float, ...] = ()
    reference_window_losses: tuple[float, ...] = ()


def windows(model: nn.Module, tokenizer: Any, text: str, context: int, limit: int | None) -> Tensor:
    """Token windows ``(count, context)`` of a text, the tokenizer's defaults applied to the whole.

    Raises:
        UsageError: fewer tokens than one window, or a context that the model does not have.
        SourceError: the tokenizer fails, or is not the model's.
    """
    check_context(model, context, least=2)
    return cut(token_ids(tokenizer, text, model)[:limit], context, context)


def check_context(model: nn.Module, context: int, least: int) -> None:
    """Raises UsageError for windows shorter than ``least`` tokens, or longer than the model's positions."""
    longest = usable_positions(model)
    if context < least or (longest is not None and context > longest):
        most = "tokens or more" if longest is None else f"to {longest} tokens"
        raise UsageError(f"--context {context}: this model takes {least} {most}")


def cut(ids: Tensor, size: int, context: int) -> Tensor:
    """Tokens ``(tokens,)`` in rows ``(count, size)``, the last partial one dropped.

    Args:
        ids: of a text.
        size: of a row.
        context: tokens a window, as the user gave it.

    Raises:
        UsageError: fewer than one row.
    """
    count = len(ids) // size
    if count == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, fewer than one window of --context {context}; give a "
            "longer text or a smaller --context"
        )
    rows: Tensor = ids[: count * size].view(count, size)
    return rows


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    reference: nn.Module | None = None,
    decoder: Decoder | None = None,
    on_progress: Progress = silent,
) -> Score:
    """Score token windows.

    Args:
        model: causal language model.
        ids: (windows, context) token ids.
        reference: also measure KL(reference || model).
        decoder: of the model, whose logits are scored: what its key-value cache loses counts then.
        on_progress: told of each window.

    Raises:
        UsageError: the reference has another vocabulary.
    """
    divergence = 0.0
    losses, wanted_losses = [], []
    for i, window in enumerate(ids):
        log_probs = _log_probs(model, window) if decoder is None else decoder.logits(window).log_softmax(-1)
        targets = window[1:, None]
        losses.append(-float(log_probs.gather(-1, targets).double().sum()))
        if reference is not None:
            wanted = _log_probs(reference, window)
            if wanted.shape != log_probs.shape:
                raise UsageError(
                    f"--against: that model has {wanted.shape[1]} tokens, this one {log_probs.shape[1]}; "
                    "compare models of one vocabulary"
                )
            divergence += float((wanted.exp() * (wanted - log_probs)).double().sum())
            wanted_losses.append(-float(wanted.gather(-1, targets).double().sum()))
        on_progress("scoring", i + 1, len(ids))
    each = ids.shape[1] - 1
    tokens = ids.shape[0] * each
    mean = sum(losses) / tokens
    return Score(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        loss=mean,
        tokens=tokens,
        divergence=None if reference is None else divergence / tokens,
        reference_loss=None if reference is None else sum(wanted_losses) / tokens,
        window_losses=tuple(loss / each for loss in losses),
        reference_window_losses=tuple(loss / each for loss in wanted_losses),
    )


@torch.inference_mode()
def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood of each window: what :func:`perplexity` averages, several at a time.

    Args:
        model: causal language model.
        ids: (windows, context) token ids.

    Returns:
        (windows,) float64, nats per token.
    """
    vocabulary = vocabulary_size(model) or 1
    together = max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary) // ids.shape[1])
    parts = []
    for batch in ids.split(together):
        log_probs = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        parts.append(-log_probs.gather(-1, batch[:, 1:, None]).double().mean((1, 2)))
    return torch.cat(parts)


def _log_probs(model: nn.Module, window: Tensor) -> Tensor:
    """Float32 log-probabilities of the next token: (context - 1, vocabulary)."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def read_text(path: Path, option: str = "--text") -> str:
    """A UTF-8 text file.

    Args:
        path: of the file.
        option: by which the user named it.

    Raises:
        UsageError: missing, empty, or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UsageError(f"{option} {path}: is empty")
    return text
