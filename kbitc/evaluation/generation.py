"""Greedy text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from kbitc.checkpoint.dense import text_of, token_ids
from kbitc.errors import UsageError

if TYPE_CHECKING:
    from kbitc.backends import Decoder


def generate(decoder: Decoder, tokenizer: Any, prompt: str, new_tokens: int) -> Iterator[str]:
    """Greedy continuation of a prompt, a piece of text for each token as it is generated.

    Prompt and continuation are decoded as one: a tokenizer may drop the space before a text's first word.

    Yields:
        Text, empty while a character is not whole; pieces concatenate to what follows the prompt.

    Raises:
        UsageError: the prompt has no tokens.
        SourceError: the tokenizer fails, or is not the model's.
    """
    ids = token_ids(tokenizer, prompt, decoder.model)[None]
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one word")
    known: list[int] = ids[0].tolist()
    shown = text_of(tokenizer, known)
    for token in decoder.generate(ids, new_tokens, ends=_end_tokens(decoder.model)):
        known.append(token)
        text = text_of(tokenizer, known)
        # A character may span several tokens: hold back until it is whole.
        if text.endswith("\ufffd"):
            yield ""
        else:
            yield text[len(shown) :]
            shown = text


def _end_tokens(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "generation_config", None) or model.config
    ends = config.eos_token_id
    return {end for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if isinstance(end, int)}
