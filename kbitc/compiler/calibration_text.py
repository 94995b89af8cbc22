"""Text as inputs of a model: which models take it, and how it is cut into windows.

The one thing to know: a causal language model reads a window as it was cut from the text; another model gets
it between the tokens with which its tokenizer begins and ends a text ([CLS] ... [SEP]).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.dense import token_ids
from kbitc.errors import UsageError
from kbitc.graph.example_inputs import TOKENS, InputMaker, is_pretrained
from kbitc.graph.input_shapes import Shape
from kbitc.graph.media_tokens import run_on_meta

_SAMPLE = 64  # characters of the text that show what a tokenizer puts around one


def is_language_model(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers: tokens in, next-token logits out."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)
    if config is None or not is_pretrained(model) or getattr(config, "is_encoder_decoder", False):
        return False
    return bool(can_generate()) and hasattr(config.get_text_config(), "vocab_size") and _tells_tokens(model)


def _tells_tokens(model: Any) -> bool:
    """Whether its logits are of the tokens that it takes: what makes sound of text has them of codes."""
    outputs = run_on_meta(model, {"input_ids": Shape((1, 2), torch.int64)})
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        return model.get_output_embeddings() is not None  # it does not run on text alone
    taken = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return logits.shape[-1] in {model.config.get_text_config().vocab_size, taken}


def takes_text(model: nn.Module) -> bool:
    """Whether a sequence of token ids is among the inputs of a model of transformers.

    Raises:
        UsageError: it has an input that cannot be made.
    """
    if not is_pretrained(model):
        return False
    shape = InputMaker.of(model, TOKENS).shapes.get("input_ids")
    return shape is not None and len(shape.sizes) == 2 and shape.dtype is torch.int64


def read_text(path: Path) -> str:
    """A text file to calibrate on.

    Raises:
        UsageError: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibrate {path}: cannot be read as UTF-8 text: {error}") from error


def spread(windows: Tensor, count: int) -> Tensor:
    """``count`` of them at most, from the first on, evenly over all."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // max(1, count)]


def all_windows(
    tokenizer: Any,
    text: str,
    length: int,
    label: str = "the calibration text",
    model: nn.Module | None = None,
    *,
    has_ends: bool = False,
) -> Tensor:
    """``(windows, length)`` int64 token ids: a text, cut.

    before:  a b c d e f g
    after:   [CLS] a b [SEP], [CLS] c d [SEP], [CLS] e f [SEP]  (length 4, with ends)

    Args:
        tokenizer: the model's.
        text: to be cut.
        length: tokens a window, those at its ends included.
        label: of the text, for messages.
        model: that is to read the tokens, if it is known.
        has_ends: put what the tokenizer puts around a text around each window.

    Raises:
        UsageError: the text is shorter than one window, or a window than its ends.
        SourceError: the tokenizer fails, or is not the model's, if that is given.
    """
    ids = token_ids(tokenizer, text, model, is_bare=has_ends)
    first, last = _ends(tokenizer, text, model) if has_ends else (ids[:0], ids[:0])
    inner = length - len(first) - len(last)
    if inner < 1:
        raise UsageError(
            f"{label}: a window of {length} tokens has no room for text between the {length - inner} tokens "
            "that the tokenizer puts around one; use --calibrate random"
        )
    available = len(ids) // inner
    if available == 0:
        raise UsageError(
            f"{label} has {len(ids)} tokens, fewer than one window of {inner}; give a longer one"
        )
    windows = ids[: available * inner].view(available, inner)
    return torch.cat([first.expand(len(windows), -1), windows, last.expand(len(windows), -1)], dim=1)


def _ends(tokenizer: Any, text: str, model: nn.Module | None) -> tuple[Tensor, Tensor]:
    """What a tokenizer puts before and behind a text; nothing, where it makes other tokens of it then."""
    sample = text.strip()[:_SAMPLE]
    bare, whole = (token_ids(tokenizer, sample, model, is_bare=each) for each in (True, False))
    for i in range(len(whole) - len(bare) + 1 if len(bare) else 0):
        if torch.equal(whole[i : i + len(bare)], bare):
            return whole[:i], whole[i + len(bare) :]
    return whole[:0], whole[:0]


def with_decoder_text(model: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs in which the decoder reads the encoder's text, too, shifted by one token.

    before:  input_ids (batch, n) a b c d, decoder_input_ids (batch, m) drawn evenly
    after:   decoder_input_ids: the decoder's first token, a, b ... of the same shape

    They stay as they are where the model has no such token, or its decoder other tokens than its encoder.
    """
    config: Any = model.config
    drawn, ids, start = feed.get("decoder_input_ids"), feed.get("input_ids"), _first_token(model)
    known = getattr(config.get_text_config(decoder=True), "vocab_size", 0)
    if drawn is None or ids is None or start is None or drawn.shape[1] > ids.shape[1]:
        return dict(feed)
    if max(int(ids.max()), start) >= known:
        return dict(feed)
    begin = torch.full((len(ids), 1), start, dtype=torch.int64)
    return {**feed, "decoder_input_ids": torch.cat([begin, ids], dim=1)[:, : drawn.shape[1]]}


def _first_token(model: Any) -> int | None:
    """With which a decoder begins; T5, whose own config may name none, takes the one for padding."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in (model.config, getattr(model, "generation_config", None)):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    return None
