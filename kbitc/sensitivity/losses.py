"""Losses whose squared gradients say what an error of the outputs costs: Fisher's information.

The one thing to know: half of g² times a squared error is then the Kullback-Leibler divergence that the
error makes, in nats. That holds on average over outcomes that the model itself draws: next tokens of a
text that it sampled, or classes drawn from its distributions here. An output that is no distribution counts
as the mean of a normal law as wide as the output's own root mean square, shared by its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.sensitivity.streaming import apply

TILE = 32  # positions whose logits are worked on at a time


def next_token_loss(ids: Tensor, outputs: Sequence[Any], not_text: Sequence[int] = ()) -> Tensor:
    """Cross-entropy of a text, in nats, summed: what a token's activation does to all later ones.

    Args:
        ids: ``(1, length)``.
        outputs: of a causal language model; the first of shape ``(1, length, vocabulary)`` is its logits.
        not_text: tokens that stand for images and sounds; nothing is to predict them.

    Raises:
        UsageError: there is none.
    """
    next_ids = ids[0].roll(-1)  # the last has none
    is_text = ~torch.isin(next_ids, torch.tensor(not_text, dtype=next_ids.dtype))[:-1]
    for value in outputs:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == ids.shape:
            logs = log_probabilities(value.float().flatten(0, 1), next_ids[:, None])
            return -logs[:-1, 0][is_text].sum()
    raise UsageError("calibration on text needs a causal language model, whose first output is logits")


def drawn_loss(outputs: Sequence[Any], classes: int | None, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of outcomes drawn from the outputs, up to constants, summed over all.

    Args:
        outputs: those that depend on weights count.
        classes: outputs of so many features are logits.
        generator: draws.

    Raises:
        UsageError: no output depends on a weight.
    """
    total: Tensor | None = None
    for value in outputs:
        if not isinstance(value, Tensor) or not value.requires_grad:
            continue
        y = value.float().flatten(0, -2) if value.dim() > 1 else value.float()[None]
        loss = _categorical(y, generator) if y.shape[-1] == classes else _normal(y, generator)
        total = loss if total is None else total + loss
    if total is None:
        raise UsageError("none of the model's outputs depends on a weight; calibrate with none")
    return total


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return -log_probabilities(logits, drawn).sum()


def _normal(mean: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator)
    width = mean.detach().square().mean().sqrt().clamp_min(1e-30)
    return torch.sum(mean * noise / (width * mean.shape[-1] ** 0.5))


def positions(outputs: Sequence[Any]) -> int:
    """Tokens, patches or sequences that the first output that depends on a weight speaks of."""
    first = next(value for value in outputs if isinstance(value, Tensor) and value.requires_grad)
    return first.numel() // first.shape[-1]


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """``logits.log_softmax(-1).gather(-1, ids)``, and on the way back one tensor like logits, not three.

    Args:
        logits: ``(positions, classes)`` float32.
        ids: ``(positions, n)`` int64, no class twice.
    """
    return apply(_LogProbabilities, logits, ids)


class _LogProbabilities(torch.autograd.Function):
    """What the forward pass keeps is its input."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        total = torch.cat([part.logsumexp(-1, keepdim=True) for part in logits.split(TILE)])
        ctx.save_for_backward(logits, ids, total)
        return logits.gather(-1, ids) - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, ids, total = ctx.saved_tensors
        back = (logits - total).exp_().mul_(-grad.sum(-1, keepdim=True))
        return back.scatter_add_(-1, ids, grad), None
