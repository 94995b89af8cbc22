"""Whether a model is a causal language model: asked of the model itself, not of its name.

The one thing to know: it must take token ids alone, give one number a token of the vocabulary at every place,
and those numbers must not change with the tokens that come after. Perplexity of anything else means nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import KbitcError, UsageError, first_line

KEPT, LENGTH = 3, 8
"""Tokens that two inputs share at their beginning, and tokens of each."""

NOISE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Share of the largest logit that a difference may be: experts sum in another order for other tokens."""


@torch.inference_mode()
def check_causal(model: nn.Module, label: str) -> None:
    """See that text can be scored and continued by a model.

    Args:
        model: in eval mode.
        label: as the user named it.

    Raises:
        UsageError: it is no causal language model; says what it is.
    """
    reason = why_not_causal(model)
    if reason is not None:
        raise UsageError(
            f"{label}: is no causal language model: its class is {type(model).__name__}, which {reason}. "
            "Perplexity and continued prompts are of causal language models alone; load this one with "
            "kbitc.load and measure it on its own task"
        )


def why_not_causal(model: Any) -> str | None:
    """What a model does that no causal language model does, as the end of a sentence; None of one that is.

    Args:
        model: in eval mode, called without gradients.

    Raises:
        UsageError: an exported one that is none.
    """
    if hasattr(model, "need_decoder"):  # an exported one says so itself
        model.need_decoder()
        return None
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "reads one text and writes another"
    vocabulary = vocabulary_size(model)
    if not vocabulary:
        return "has no vocabulary"
    first = (vocabulary // 2 + torch.arange(LENGTH)) % vocabulary
    second = torch.cat([first[:KEPT], (first[KEPT:] + vocabulary // 3 + 1) % vocabulary])
    outcomes = []
    for ids in (first, second):
        try:
            logits = model(input_ids=ids[None], use_cache=False).logits
        except KbitcError:
            raise
        except AttributeError:
            return "gives no logits"
        except Exception as error:  # noqa: BLE001  # whatever a model says that wants other inputs
            return f"cannot be given token ids alone ({first_line(error)})"
        if not isinstance(logits, Tensor) or logits.shape[:2] != (1, LENGTH) or logits.shape[2] < vocabulary:
            return "does not give a number for each token of its vocabulary at each place"
        outcomes.append(logits[0, :KEPT])
    difference = float((outcomes[0] - outcomes[1]).abs().max())
    largest = float(outcomes[0].abs().max())
    is_same = difference <= NOISE.get(outcomes[0].dtype, 0.0) * largest
    return None if is_same else "reads the tokens after a place too, as masked language models do"
