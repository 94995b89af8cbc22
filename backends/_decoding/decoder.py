"""Decoding a causal language model of transformers token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kbitc.backends._decoding.cache import ROUND, CacheFormat, GrowingCache, PlainCache, cache_format
from kbitc.errors import UsageError


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot be decoded with a `GrowingCache`; None if it can."""
    config: Any = getattr(model, "config", None)
    if config is None or not getattr(model, "can_generate", lambda: False)():
        return f"{type(model).__name__} is not a causal language model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder-decoder model"
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return f"{type(model).__name__} keeps its own kind of cache"
    strange = {type(layer) for layer in DynamicCache(config=config).layers}
    strange -= {DynamicLayer, DynamicSlidingWindowLayer}
    if strange:
        names = ", ".join(sorted(kind.__name__ for kind in strange))
        return f"{type(model).__name__} has layers with another state than keys and values ({names})"
    return None


def layer_count(model: nn.Module) -> int:
    """Layers of a decoder that have keys and values."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    return len(DynamicCache(config=config).layers) or int(text.num_hidden_layers)


class Decoder:
    """Decodes with the model's own forward.

    Attributes:
        model: causal language model of transformers.
        name: of the backend.
        why_compiled: why a step is compiled that might have been native; "" where that does not arise.
        kv: how new caches keep keys and values.
    """

    name = "eager"
    why_compiled = ""
    kv: CacheFormat = PlainCache()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The head is a fifth of a small model: a prompt needs the logits of its last token alone.
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def new_cache(self, room: int = ROUND) -> Any:
        """An empty cache for about so many tokens; it grows when there are more."""
        if why_not(self.model) is None:
            return GrowingCache(layer_count(self.model), room, self.kv)
        return None

    def use_cache(self, kv: str) -> None:
        """Keep keys and values of new caches in a format.

        Args:
            kv: "fp16", the spec of a k-bit cache, for example "int8:64", or those of keys and of values:
                "int6:64,nf4:64".

        Raises:
            UsageError: no such format, or one that this decoder does not take.
        """
        found = cache_format(kv)
        reason = self._why_no_cache(found)
        if reason is not None:
            raise UsageError(f"--kv {kv}: {reason}")
        self.kv = found

    def _why_no_cache(self, kv: CacheFormat) -> str | None:
        """Why caches of a format cannot be used here; None if they can."""
        if why_not(self.model) is not None:
            return why_not(self.model)
        if not isinstance(kv, PlainCache):
            why = f" ({self.why_compiled})" if self.why_compiled else ""
            return (
                "a k-bit cache needs packed weights on the CPU and the native step of the backend "
                f"'cpu'{why}; without these take fp16"
            )
        return None

    def prefill(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Read a prompt.

        Args:
            ids: (1, tokens) int64.
            cache: to go on from; by default a new one.

        Returns:
            Logits of the next token, (1, vocabulary), and the cache.
        """
        cache = self.new_cache(ids.shape[1] + ROUND) if cache is None else cache
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_only)
        return out.logits[:, -1], out.past_key_values

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits of each of a text's tokens, which go through a new cache.

        Args:
            ids: (tokens) int64.

        Returns:
            (tokens, vocabulary) float32.
        """
        cache = self.new_cache(len(ids))
        out: Tensor = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]
        return out.float()

    def step(self, token: int, cache: Any) -> Tensor:
        """Append one token to the cache; logits of the next one, (1, vocabulary)."""
        logits: Tensor
        logits, _ = self.prefill(torch.tensor([[token]]), cache)
        return logits

    def spent(self) -> dict[str, float]:
        """Seconds since the last call of this, by what took them; empty where nothing tells them apart."""
        return {}

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        ends: frozenset[int] | set[int] = frozenset(),
    ) -> Iterator[int]:
        """Continue a prompt, token by token.

        Args:
            ids: (1, tokens) int64, at least one.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token; above, tokens are drawn.
            top_k: draw from the likeliest so many only.
            generator: of random numbers.
            ends: tokens that end the text; they are not given out.

        Raises:
            UsageError: a batch, or no token at all.
        """
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            raise UsageError(f"generate takes ids of shape (1, tokens), got {tuple(ids.shape)}")
        logits, cache = self.prefill(ids, self.new_cache(ids.shape[1] + max_new_tokens))
        for made in range(max_new_tokens):
            token = _pick(logits[0], temperature, top_k, generator)
            if token in ends:
                return
            yield token
            if made + 1 < max_new_tokens:
                logits = self.step(token, cache)


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scores = logits.float() / temperature
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
