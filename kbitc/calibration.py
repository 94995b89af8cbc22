"""Text to calibrate a language model on: the user's, or what the model itself samples.

The one thing to know: calibration looks at token windows alone, and a window that the model sampled needs
no data of the user's. Sampling has its own random generator: the global one is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.errors import UsageError

COUNT = 8
LENGTH = 512
SEED = 0

Progress = Callable[[int, int], None]


def window_length(model: nn.Module, length: int = LENGTH) -> int:
    """``length``, or what the model can take if that is less."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(length, longest) if longest else length


def is_language_model(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers: tokens in, next-token logits out."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)
    is_pair = getattr(config, "is_encoder_decoder", False)
    return config is not None and not is_pair and bool(can_generate()) and hasattr(config, "vocab_size")


def text_windows(
    tokenizer: Any, text: str, length: int, count: int = COUNT, label: str = "the calibration text"
) -> Tensor:
    """``(count, length)`` token ids, evenly spread over a text.

    Raises:
        UsageError: the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    available = len(ids) // length
    if available == 0:
        raise UsageError(f"{label} has {len(ids)} tokens, fewer than one window of {length}; give a longer one")
    picked = torch.arange(min(count, available)) * available // min(count, available)
    found: Tensor = ids[: available * length].view(available, length)[picked]
    return found


@torch.inference_mode()
def sample_windows(
    model: nn.Module,
    length: int,
    count: int = COUNT,
    seed: int = SEED,
    on_token: Progress = lambda *_: None,
) -> Tensor:
    """``(count, length)`` token ids that the model samples at temperature 1, from random first tokens.

    Args:
        model: a causal language model of transformers.
        length: tokens a window.
        count: windows.
        seed: of a generator of its own.
        on_token: progress.
    """
    from transformers import DynamicCache

    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.get_text_config().vocab_size, (count, 1), generator=generator)
    cache, ids = DynamicCache(), [tokens]
    for i in range(1, length):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        ids.append(tokens)
        on_token(i + 1, length)
    return torch.cat(ids, dim=1)
