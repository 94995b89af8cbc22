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

    Prompt and continuation are decoded as one: a tokenizer may drop the space before a text's first word.

    Yields:
        Text, empty while a character is not whole; pieces concatenate to what follows the prompt.

    Raises:
        UsageError: the prompt has no tokens.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one word")
    known: list[int] = ids[0].tolist()
    shown = _text(tokenizer, known)
    for token in decoder.generate(ids, new_tokens, ends=_end_tokens(decoder.model)):
        known.append(token)
        text = _text(tokenizer, known)
        # A character may span several tokens: hold back until it is whole.
        if text.endswith("\ufffd"):
            yield ""
        else:
            yield text[len(shown) :]
            shown = text


def _text(tokenizer: Any, ids: list[int]) -> str:
    # Cleaning up would change what was shown before: "do n" to "don't".
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _end_tokens(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "generation_config", None) or model.config
    ends = config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}
