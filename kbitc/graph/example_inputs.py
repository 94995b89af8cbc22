"""Inputs to trace a transformers model with: shapes and dtypes from its config, never data.

The one thing to know: the sizes are only large enough to take the general path (two sequences, more
than one token, decoder shorter than encoder); weights are found at any size.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kbitc.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

BATCH = 2
TOKENS = 8
IMAGE_SIZE = 224  # of vision models that take any size, and so have none in their config
MADE = ("input_ids", "pixel_values")


def is_pretrained(module: nn.Module) -> bool:
    """True for a transformers model; does not import transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def example_inputs(model: nn.Module, batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Keyword inputs on the meta device for a transformers model, by its main input and signature.

    Args:
        model: of transformers.
        batch: sequences or images.
        tokens: of a sequence, at most as many as the model takes; a decoder gets one less.

    Raises:
        UsageError: not a transformers model, or one whose inputs are neither tokens nor images.
    """
    name = type(model).__name__
    if not is_pretrained(model):
        raise UsageError(
            f"{name} is not a transformers model, so its inputs cannot be guessed; pass "
            "example_inputs=(tensor, ...) or example_inputs={'name': tensor}; only shapes matter"
        )
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    sizes = _sizes(model, config, accepted, (batch, tokens))
    lacking = [
        parameter.name
        for parameter in accepted.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in sizes
    ]
    main = getattr(model, "main_input_name", "input_ids")
    if main not in sizes or lacking:
        raise UsageError(
            f"{name} takes '{(lacking or [main])[0]}', and kbitc only makes {' and '.join(MADE)}; "
            "pass example_inputs={'name': tensor, ...} with everything that its forward needs"
        )
    dtypes = {"pixel_values": getattr(model, "dtype", torch.float32)}
    return {
        key: torch.empty(size, device="meta", dtype=dtypes.get(key, torch.int64))
        for key, size in sizes.items()
    }


def random_inputs(model: nn.Module, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Keyword inputs of batch 1: token ids drawn evenly from the vocabulary, pixels from a normal law.

    Args:
        model: of transformers.
        tokens: see :func:`example_inputs`.
        generator: draws.

    Raises:
        UsageError: see :func:`example_inputs`.
    """
    config: Any = model.config
    made = {}
    for key, like in example_inputs(model, 1, tokens).items():
        if like.is_floating_point():
            made[key] = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        elif key == "attention_mask":
            made[key] = torch.ones(like.shape, dtype=torch.int64)
        else:
            vocabulary = config.get_text_config().vocab_size
            made[key] = torch.randint(vocabulary, like.shape, generator=generator)
    return made


def _sizes(
    model: Any, config: Any, accepted: Mapping[str, inspect.Parameter], size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    batch, length = size
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    tokens = (batch, min(length, longest))
    # A language model that takes images among its tokens runs without any; CLIP needs both.
    has_images = "pixel_values" in accepted and not _mixes_images_into_tokens(config)
    if "input_ids" in accepted:
        sizes["input_ids"] = tokens
    if has_images:
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
        height, width = _pair(getattr(vision, "image_size", None) or IMAGE_SIZE)
        sizes["pixel_values"] = (batch, getattr(vision, "num_channels", 3), height, width)
    if "input_ids" in sizes and "attention_mask" in accepted and not model.can_generate():
        sizes["attention_mask"] = tokens
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        sizes["decoder_input_ids"] = (batch, min(length - 1, longest))
    return sizes


def _mixes_images_into_tokens(config: Any) -> bool:
    return any(hasattr(config, key) for key in ("image_token_id", "image_token_index"))


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
