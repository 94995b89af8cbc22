"""Perplexity, KL divergence and speed of a model, packed or not.

The one thing to know: perplexity is the exponential of the mean negative log-likelihood over tokens
2 ... n of non-overlapping windows; the last partial window is dropped (DESIGN section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.dense import token_ids
from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import UsageError
from kbitc.graph.context import Progress, silent
from kbitc.graph.positions import usable_positions

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
    """

    perplexity: float
    loss: float
    tokens: int
    divergence: float | None = None
    reference_loss: float | None = None


def windows(model: nn.Module, tokenizer: Any, text: str, context: int, limit: int | None) -> Tensor:
    """Token windows ``(count, context)`` of a text, the tokenizer's defaults applied to the whole.

    Raises:
        UsageError: fewer tokens than one window, or a context that the model does not have.
        SourceError: the tokenizer fails, or is not the model's.
    """
    longest = usable_positions(model)
    if context < 2 or (longest is not None and context > longest):
        most = "tokens or more" if longest is None else f"to {longest} tokens"
        raise UsageError(f"--context {context}: this model takes 2 {most}")
    ids = token_ids(tokenizer, text, model)
    ids = ids if limit is None else ids[:limit]
    count = len(ids) // context
    if count == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, fewer than one window of --context {context}; give a "
            "longer text or a smaller --context"
        )
    windowed: Tensor = ids[: count * context].view(count, context)
    return windowed


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    reference: nn.Module | None = None,
    on_progress: Progress = silent,
) -> Score:
    """Score token windows.

    Args:
        model: causal language model.
        ids: (windows, context) token ids.
        reference: also measure KL(reference || model).
        on_progress: told of each window.

    Raises:
        UsageError: the reference has another vocabulary.
    """
    loss = divergence = wanted_loss = 0.0
    for i, window in enumerate(ids):
        log_probs = _log_probs(model, window)
        targets = window[1:, None]
        loss -= float(log_probs.gather(-1, targets).double().sum())
        if reference is not None:
            wanted = _log_probs(reference, window)
            if wanted.shape != log_probs.shape:
                raise UsageError(
                    f"--against: that model has {wanted.shape[1]} tokens, this one {log_probs.shape[1]}; "
                    "compare models of one vocabulary"
                )
            divergence += float((wanted.exp() * (wanted - log_probs)).double().sum())
            wanted_loss -= float(wanted.gather(-1, targets).double().sum())
        on_progress("scoring", i + 1, len(ids))
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    mean = loss / tokens
    return Score(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        loss=mean,
        tokens=tokens,
        divergence=None if reference is None else divergence / tokens,
        reference_loss=None if reference is None else wanted_loss / tokens,
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


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: missing, empty, or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UsageError(f"--text {path}: is empty")
    return text
