"""A key-value cache of one sequence that never copies itself, its numbers plain or of k bits.

The one thing to know: a layer keeps keys as rows, (room, heads, …): the first L rows are one contiguous
block whose strides do not depend on the room. A compiled graph can take them as an input of dynamic length,
attention reads exactly the tokens that exist, and no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kbitc.backends._decoding.packed_rows import MOST, PackedRows, check_spec, moved
from kbitc.errors import UsageError
from kbitc.formats.spec import Spec, parse

ROUND = 64  # rooms are multiples of it


class Rows(Protocol):
    """Keys, or values, of one layer's tokens."""

    def grow(self, used: int, room: int) -> None:
        """Room for more tokens; the first ``used`` stay."""
        ...

    def write(self, start: int, rows: Tensor) -> None:
        """(tokens, heads, size) rows from a token on."""
        ...

    def read(self, length: int, dtype: torch.dtype) -> Tensor:
        """The first rows: (length, heads, size)."""
        ...

    def addresses(self) -> list[int]:
        """Where they lie, as ``kbit::run_step`` takes it."""
        ...


class CacheFormat(Protocol):
    """How keys and values are kept."""

    def rows(self, room: int, heads: int, size: int, dtype: torch.dtype, *, is_keys: bool) -> Rows:
        """Memory for the rows of a layer.

        Args:
            room: tokens.
            heads: of keys.
            size: of a head.
            dtype: what the model computes in.
            is_keys: or values.
        """
        ...


@dataclass(frozen=True)
class PlainCache:
    """Numbers as they are.

    Attributes:
        dtype: of the numbers; None for what the model computes in.
    """

    dtype: torch.dtype | None = None

    def rows(self, room: int, heads: int, size: int, dtype: torch.dtype, *, is_keys: bool) -> PlainRows:
        """See `CacheFormat`."""
        del is_keys
        return PlainRows(torch.empty(room, heads, size, dtype=self.dtype or dtype))


@dataclass(frozen=True)
class PackedCache:
    """Numbers of k bits (`PackedRows`).

    Attributes:
        keys: format of each row of a token and a head; blocks run along the head.
        values: likewise.
    """

    keys: Spec
    values: Spec

    def rows(self, room: int, heads: int, size: int, dtype: torch.dtype, *, is_keys: bool) -> PackedRows:
        """See `CacheFormat`."""
        del dtype
        return PackedRows(self.keys if is_keys else self.values, room, heads, size, is_keys=is_keys)


def cache_format(text: str) -> PlainCache | PackedCache:
    """What ``--kv`` names: "fp16", the spec of a k-bit cache, or those of keys and of values with a comma.

    >>> cache_format("int8:64").values.bits
    8
    >>> cache_format("int6:64,nf4:64").values.bits
    4

    Raises:
        UsageError: no spec, or one whose scales or codebook need more than a row.
    """
    specs = [parse(part) for part in text.split(",")]
    if len(specs) > 2:
        raise UsageError(f"--kv {text}: name one format, or one of keys and one of values")
    if all(spec.is_left_alone for spec in specs):
        return PlainCache(torch.float16)
    for spec in specs:
        check_spec(spec)
    return PackedCache(specs[0], specs[-1])


class PlainRows:
    """See `Rows`.

    Attributes:
        numbers: (room, heads, size).
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def grow(self, used: int, room: int) -> None:
        """See `Rows`."""
        self.numbers = moved(self.numbers, used, room)

    def write(self, start: int, rows: Tensor) -> None:
        """See `Rows`; what is too large for float16 becomes its largest."""
        is_half = self.numbers.dtype == torch.float16
        self.numbers[start : start + len(rows)] = rows.clamp(-MOST, MOST) if is_half else rows

    def read(self, length: int, dtype: torch.dtype) -> Tensor:
        """See `Rows`."""
        return self.numbers[:length].to(dtype)

    def addresses(self) -> list[int]:
        """See `Rows`."""
        return [self.numbers.data_ptr()]


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer for one sequence, in buffers that double when they are full.

    Attributes:
        length: tokens seen.
        room: tokens that there is memory for.
        format: how they are kept.
        key_rows: None before the first update; ``value_rows`` likewise.
    """

    def __init__(self, room: int = ROUND, kept_as: CacheFormat | None = None) -> None:
        self.length = 0
        self.room = room
        self.format: CacheFormat = kept_as or PlainCache()
        self.key_rows: Rows | None = None
        self.value_rows: Rows | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """What transformers sees: (1, heads, length, size), a view where nothing is to be unpacked."""
        return None if self.key_rows is None else self._states(self.key_rows)

    @keys.setter
    def keys(self, value: object) -> None:
        assert value is None, "a growing layer is changed by update and crop alone"

    @property
    def values(self) -> Tensor | None:
        """See ``keys``."""
        return None if self.value_rows is None else self._states(self.value_rows)

    @values.setter
    def values(self, value: object) -> None:
        assert value is None, "a growing layer is changed by update and crop alone"

    def _states(self, rows: Rows) -> Tensor:
        return rows.read(self.length, self.dtype).transpose(0, 1).unsqueeze(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of these shapes, (1, heads, tokens, size)."""
        if key_states.shape[0] != 1:
            raise UsageError(f"this cache holds one sequence, not a batch of {key_states.shape[0]}")
        self.device = key_states.device
        self.allocate(key_states.shape[1], key_states.shape[3], value_states.shape[3], key_states.dtype)

    def allocate(self, heads: int, key_size: int, value_size: int, dtype: torch.dtype) -> None:
        """Memory for heads of keys and values of some sizes; the model computes in ``dtype``."""
        self.dtype = dtype
        self.key_rows = self.format.rows(self.room, heads, key_size, dtype, is_keys=True)
        self.value_rows = self.format.rows(self.room, heads, value_size, dtype, is_keys=False)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (1, heads, tokens, size) states; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.length
        self.advance(key_states.shape[2])
        states = []
        for rows, new in ((self.key_rows, key_states), (self.value_rows, value_states)):
            assert rows is not None
            rows.write(start, new[0].transpose(0, 1))
            states.append(self._states(rows).to(new.dtype))
        return states[0], states[1]

    def advance(self, tokens: int) -> None:
        """Make room for tokens and count them as seen."""
        used, self.length = self.length, self.length + tokens
        if self.length <= self.room:
            return
        self.room = round_up(max(self.length, 2 * self.room))
        for rows in (self.key_rows, self.value_rows):
            assert rows is not None
            rows.grow(used, self.room)

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


class GrowingCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A transformers cache of `GrowingLayer`.

    Attributes:
        growing: the layers.
        format: how they keep keys and values.
    """

    def __init__(self, layers: int, room: int = ROUND, kept_as: CacheFormat | None = None) -> None:
        self.format = kept_as or PlainCache()
        self.growing = [GrowingLayer(round_up(room), self.format) for _ in range(layers)]
        super().__init__(layers=list(self.growing))

    def addresses(self, tokens: int) -> Tensor:
        """Count more tokens; where keys and values of each layer lie, (1, addresses) int64."""
        for layer in self.growing:
            layer.advance(tokens)
        parts = [rows for layer in self.growing for rows in (layer.key_rows, layer.value_rows)]
        return torch.tensor([[at for rows in parts if rows is not None for at in rows.addresses()]])

    def numbers(self) -> list[Tensor]:
        """Count one more token, and give keys and values of each layer: (length, heads, size).

        Raises:
            UsageError: they are no plain numbers.
        """
        found = []
        for layer in self.growing:
            layer.advance(1)
            for rows in (layer.key_rows, layer.value_rows):
                if not isinstance(rows, PlainRows):
                    raise UsageError("this decode step takes caches of plain numbers alone")
                found.append(rows.numbers[: layer.length])
        return found
