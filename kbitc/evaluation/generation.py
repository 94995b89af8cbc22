"""Greedy text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from kbitc.errors import UsageError

if TYPE_CHECKING:
    from kbitc.backends import Decoder


def generate(decoder: Decoder, tokenizer: Any, prompt: str, new_tokens: int) -> Iterator[str]:
    """Greedy continuation of a prompt, a piece of text for each token as it is generated.

    Yields:
        Text, empty while a character is not whole; pieces concatenate to the continuation.

    Raises:
        UsageError: the prompt has no tokens.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one word")
    made: list[int] = []
    shown = ""
    for token in decoder.generate(ids, new_tokens, ends=_end_tokens(decoder.model)):
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        # A character may span several tokens: hold back until it is whole.
        if text.endswith("\ufffd"):
            yield ""
        else:
            yield text[len(shown) :]
            shown = text


def _end_tokens(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "generation_config", None) or model.config
    ends = config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}
