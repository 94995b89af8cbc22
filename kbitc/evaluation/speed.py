"""Prefill and decode speed of a decoder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kbitc.backends import Decoder


@dataclass(frozen=True)
class Speed:
    """Result of :func:`speed`, in tokens per second.

    Attributes:
        prefill: prompt tokens per second, median of the runs.
        decode: generated tokens per second at batch 1, median of the runs.
    """

    prefill: float
    decode: float


@torch.inference_mode()
def speed(decoder: Decoder, prompt_tokens: int, new_tokens: int, runs: int) -> Speed:
    """Prefill and greedy decode speed at batch 1, after one warm-up run of each."""
    config: Any = decoder.model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    prefill, decode = [], []
    for _ in range(runs + 1):
        cache = decoder.new_cache(prompt_tokens + new_tokens)
        start = time.perf_counter()
        logits, cache = decoder.prefill(prompt, cache)
        middle = time.perf_counter()
        for _ in range(new_tokens):
            logits = decoder.step(int(logits.argmax()), cache)
        prefill.append(prompt_tokens / (middle - start))
        decode.append(new_tokens / (time.perf_counter() - middle))
    return Speed(_median(prefill[1:]), _median(decode[1:]))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
