"""Prefill and decode speed of a decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        spent: seconds of a generated token by what took them, mean of the runs; empty where the decoder does
            not tell.
    """

    prefill: float
    decode: float
    spent: Mapping[str, float] = field(default_factory=dict)


@torch.inference_mode()
def speed(decoder: Decoder, prompt_tokens: int, new_tokens: int, runs: int) -> Speed:
    """Prefill and greedy decode speed at batch 1, after one warm-up run of each."""
    config: Any = decoder.model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    prefill, decode, spent = [], [], []
    for _ in range(runs + 1):
        cache = decoder.new_cache(prompt_tokens + new_tokens)
        start = time.perf_counter()
        logits, cache = decoder.prefill(prompt, cache)
        middle = time.perf_counter()
        decoder.spent()
        for _ in range(new_tokens):
            logits = decoder.step(int(logits.argmax()), cache)
        prefill.append(prompt_tokens / (middle - start))
        decode.append(new_tokens / (time.perf_counter() - middle))
        spent.append(decoder.spent())
    each = {kind: sum(run[kind] for run in spent[1:]) / (runs * new_tokens) for kind in spent[0]}
    return Speed(_median(prefill[1:]), _median(decode[1:]), each)


def read_bandwidth(nbytes: int = 1 << 28, times: int = 7) -> float:
    """Bytes per second that torch's threads read from memory: the best of some sums over float32.

    Args:
        nbytes: read each time; more than caches hold.
        times: how often.
    """
    memory = torch.ones(nbytes // 4)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return memory.nbytes / best


def bytes_of_a_token(model: Any, nbytes: int) -> int:
    """Stored bytes that a decoded token reads: all but an embedding that is no head, of which it takes a row.

    Args:
        model: causal language model of transformers.
        nbytes: of all its stored tensors.
    """
    embedding, head = (
        getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")
    )
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    if weights[0] is None or weights[0] is weights[1]:
        return nbytes
    return nbytes - int(weights[0].nbytes)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
