"""Values of a replay: pairs of the two models', and those that wait between two steps.

The one thing to know: a value that both models share stands once. What waits is kept in memory up to a bound
and in an unnamed file beyond it, which a kill leaves no trace of.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kbitc.cache import cache_folder, make_private
from kbitc.errors import BackendUnavailable, UsageError

Values = dict[fx.Node, Any]
"""What nodes gave for one input."""


@dataclass(frozen=True)
class Pair:
    """A value that differs between the two models.

    Attributes:
        source: in the source model.
        packed: in the partly quantized one.
    """

    source: Any
    packed: Any


def of_source(value: Any) -> Any:
    """A value, or a structure of values, in the source model."""
    return pytree.tree_map_only(Pair, lambda pair: pair.source, value, is_leaf=is_pair)


def of_packed(value: Any) -> Any:
    """The same in the partly quantized model."""
    return pytree.tree_map_only(Pair, lambda pair: pair.packed, value, is_leaf=is_pair)


def is_pair(value: Any) -> bool:
    """Whether it is a `Pair`, which no walk through structures enters."""
    return isinstance(value, Pair)


def has_pair(value: Any) -> bool:
    """Whether a structure of values holds a `Pair`."""
    return any(is_pair(leaf) for leaf in pytree.tree_leaves(value, is_leaf=is_pair))


def storages(value: Any) -> set[int]:
    """Addresses of the memory that the tensors of a structure, pairs included, lie in."""
    both = pytree.tree_leaves((of_source(value), of_packed(value)))
    return {leaf.untyped_storage().data_ptr() for leaf in both if isinstance(leaf, Tensor)}


class Shelf:
    """Values of every input, between two steps of a replay.

    Args:
        room: bytes to keep in memory.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[int, Values] = {}
        self.filed: dict[int, tuple[int, Any]] = {}
        self._file: Any = None
        self._end = 0

    def put(self, index: int, values: Values) -> None:
        """Keep the values of input ``index``; called for one input after another.

        Raises:
            UsageError: they do not fit into memory, and no file can hold them.
        """
        size = sum(_sizes(values).values())
        if size <= self.room:
            self.room -= size
            self.held[index] = values
            return
        if self._file is None:
            self._file = _unnamed_file()
        start, self._end = self._end, self._end + size
        try:
            self.filed[index] = (start, _write(self._file.fileno(), start, values))
        except OSError as error:
            raise UsageError(_no_room(error)) from error

    def get(self, index: int) -> Values:
        """Those of input ``index``: to be read, and not to be changed unless they are dropped afterwards."""
        if index in self.held:
            return self.held[index]
        start, form = self.filed[index]
        return _read(self._file.fileno(), start, form)

    def drop(self, index: int) -> None:
        """Forget what is held in memory of an input."""
        self.held.pop(index, None)

    def close(self) -> None:
        """Forget everything."""
        self.held.clear()
        self.filed.clear()
        if self._file is not None:
            self._file.close()


def _unnamed_file() -> Any:
    folder = cache_folder() / "replay"
    try:
        return tempfile.TemporaryFile(dir=make_private(folder))
    except (OSError, BackendUnavailable) as error:
        raise UsageError(_no_room(error)) from error


def _no_room(error: Exception) -> str:
    return (
        f"what calibration computes does not fit into memory and cannot be kept in {cache_folder()}: "
        f"{error}. Set KBITC_CACHE to a folder with room, or calibrate on less text"
    )


@dataclass(frozen=True)
class _View:
    """A tensor as a view of the nth stored memory."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _tensors(values: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves((of_source(values), of_packed(values)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _sizes(values: Mapping[fx.Node, Any]) -> dict[int, int]:
    """Bytes of each memory that tensors lie in, by its address."""
    found = (tensor.untyped_storage() for tensor in _tensors(list(values.values())))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _write(file: int, start: int, values: Values) -> Any:
    """Write the memory of all tensors; gives the values with `_View` in the place of tensors."""
    order: dict[int, int] = {}
    for tensor in _tensors(list(values.values())):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in order:
            order[storage.data_ptr()] = len(order)
            data = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            _write_all(file, _bytes_of(data), start)
            start += storage.nbytes()
    sizes = list(_sizes(values).values())

    def view(tensor: Tensor) -> _View:
        at = order[tensor.untyped_storage().data_ptr()]
        return _View(at, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    return sizes, {node: _mapped(Tensor, view, value) for node, value in values.items()}


def _read(file: int, start: int, form: Any) -> Values:
    sizes, values = form
    memory = []
    for size in sizes:
        data = torch.empty(size, dtype=torch.uint8)
        _read_all(file, _bytes_of(data), start)
        memory.append(data.untyped_storage())
        start += size

    def tensor(view: _View) -> Tensor:
        empty: Any = torch.empty(0, dtype=view.dtype)
        made: Tensor = empty.set_(memory[view.storage], view.offset, view.size, view.stride)
        return made

    return {node: _mapped(_View, tensor, value) for node, value in values.items()}


def _mapped(kind: type, function: Any, value: Any) -> Any:
    """A structure of values with ``function`` of each ``kind``, inside pairs too."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Pair):
            return Pair(_mapped(kind, function, leaf.source), _mapped(kind, function, leaf.packed))
        return function(leaf) if isinstance(leaf, kind) else leaf

    return pytree.tree_map(one, value, is_leaf=lambda leaf: isinstance(leaf, (Pair, _View)))


def _bytes_of(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


def _write_all(file: int, data: memoryview, start: int) -> None:
    while data:
        done = os.pwrite(file, data, start)
        data, start = data[done:], start + done


def _read_all(file: int, data: memoryview, start: int) -> None:
    while data:
        done = os.preadv(file, [data], start)
        assert done, "a file of values is shorter than what was written"
        data, start = data[done:], start + done
