"""Decoding a causal language model token by token, with a key-value cache that never copies itself.

The one thing to know: `GrowingLayer` keeps keys as rows, (room, heads, size): the first L rows are one
contiguous block whose strides do not depend on the room. A compiled graph can take them as an input of
dynamic length, attention reads exactly the tokens that exist, and no mask is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kbitc.errors import UsageError

ROUND = 64  # rooms are multiples of it


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer for one sequence, in buffers that double when they are full.

    Attributes:
        length: tokens seen.
        key_rows: (room, heads, size), None before the first update; ``value_rows`` likewise.
    """

    def __init__(self, room: int = ROUND) -> None:
        self.length = 0
        self.room = room
        self.key_rows: Tensor | None = None
        self.value_rows: Tensor | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """What transformers sees: (1, heads, length, size), a view; ``values`` likewise."""
        return None if self.key_rows is None else _as_states(self.key_rows[: self.length])

    @keys.setter
    def keys(self, value: object) -> None:
        assert value is None, "a growing layer is changed by update and crop alone"

    @property
    def values(self) -> Tensor | None:
        """See ``keys``."""
        return None if self.value_rows is None else _as_states(self.value_rows[: self.length])

    @values.setter
    def values(self, value: object) -> None:
        assert value is None, "a growing layer is changed by update and crop alone"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of these shapes, (1, heads, tokens, size)."""
        if key_states.shape[0] != 1:
            raise UsageError(f"this cache holds one sequence, not a batch of {key_states.shape[0]}")
        self.allocate(key_states[0, :, 0], value_states[0, :, 0])

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Rows for keys and values like these of one token, (heads, size)."""
        self.dtype, self.device = key.dtype, key.device
        self.key_rows = key.new_empty(self.room, *key.shape)
        self.value_rows = value.new_empty(self.room, *value.shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (1, heads, tokens, size) states; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.length
        key_rows, value_rows = self.extend(key_states.shape[2])
        key_rows[start:] = key_states[0].transpose(0, 1)
        value_rows[start:] = value_states[0].transpose(0, 1)
        return _as_states(key_rows).to(key_states.dtype), _as_states(value_rows).to(value_states.dtype)

    def extend(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for tokens and count them as seen; all rows, the new ones to be written."""
        self.advance(tokens)
        assert self.key_rows is not None
        assert self.value_rows is not None
        return self.key_rows[: self.length], self.value_rows[: self.length]

    def advance(self, tokens: int) -> None:
        """Make room for tokens and count them as seen."""
        used, self.length = self.length, self.length + tokens
        if self.length <= self.room:
            return
        assert self.key_rows is not None
        assert self.value_rows is not None
        self.room = round_up(max(self.length, 2 * self.room))
        self.key_rows = _moved(self.key_rows, used, self.room)
        self.value_rows = _moved(self.value_rows, used, self.room)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative count, as transformers has it."""
        if tokens_to_remove > 0:
            raise UsageError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)


def round_up(tokens: int) -> int:
    """The room for so many tokens."""
    return -(-tokens // ROUND) * ROUND


def _moved(rows: Tensor, used: int, room: int) -> Tensor:
    larger = rows.new_empty(room, *rows.shape[1:])
    larger[:used] = rows[:used]
    return larger


def _as_states(rows: Tensor) -> Tensor:
    return rows.transpose(0, 1).unsqueeze(0)


class GrowingCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A transformers cache of `GrowingLayer`.

    Attributes:
        growing: the layers.
    """

    def __init__(self, layers: int, room: int = ROUND) -> None:
        self.growing = [GrowingLayer(round_up(room)) for _ in range(layers)]
        super().__init__(layers=list(self.growing))

    def addresses(self, tokens: int) -> Tensor:
        """Count more tokens; where keys and values of each layer lie, (1, 2 layers) int64."""
        for layer in self.growing:
            layer.advance(tokens)
        rows = [rows for layer in self.growing for rows in (layer.key_rows, layer.value_rows)]
        return torch.tensor([[part.data_ptr() for part in rows if part is not None]])

    def rows(self) -> list[Tensor]:
        """Count one more token, and give keys and values of each layer: (length, heads, size)."""
        return [rows for layer in self.growing for rows in layer.extend(1)]


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
    """

    name = "eager"
    why_compiled = ""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The head is a fifth of a small model: a prompt needs the logits of its last token alone.
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def new_cache(self, room: int = ROUND) -> Any:
        """An empty cache for about so many tokens; it grows when there are more."""
        if why_not(self.model) is None:
            return GrowingCache(layer_count(self.model), room)
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
