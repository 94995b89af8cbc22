"""A source's model that runs in float32, and of whose weights a bounded part lies in memory.

The one thing to know: what is beyond the bound is read from the source whenever an operation needs it. A
first gigabyte is held in float32; of the rest, an operation widens some rows at a time. Numbers are those of
a model in float32, and do not depend on what is held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.finite import check_finite
from kbitc.checkpoint.names import stored_names, tensor_of
from kbitc.errors import SourceError
from kbitc.graph.context import Progress, silent

HELD = 1 << 28  # values that are widened once and held, which takes 1 GB and halves the time of a token
KEPT = 9 << 27  # bytes of all that is held, as wide as it is held: 1.2 GB
PIECE = 1 << 21  # values that are widened at once: 8 MB, so that they stay in a processor's cache

_FORM = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_mps", "layout", "grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")),
}
"""What is asked of a weight without reading its values."""


class _Unread(nn.Parameter):
    """A weight that lies in the source: of its shape and dtype, all NaN, and in no memory.

    An operation that got hold of it past `widened` would make NaNs, which sampling refuses.
    """

    checkpoint: Checkpoint
    stored_name: str

    @staticmethod
    def of(checkpoint: Checkpoint, name: str) -> _Unread:
        """The weight of that name, seen to be finite."""
        info = checkpoint.tensors()[name]
        nothing = torch.full((1,), torch.nan, dtype=info.dtype).expand(info.shape)
        weight = _Unread(nothing, requires_grad=False)
        weight.checkpoint, weight.stored_name = checkpoint, name
        for piece in weight.pieces(max(1, PIECE // max(1, weight[0].numel()))):
            check_finite(name, piece)  # whole, it would leave holes between what is held
        return weight

    def read(self) -> Tensor:
        """All of it."""
        return self.checkpoint.read(self.stored_name)

    def pieces(self, rows: int) -> Iterator[Tensor]:
        """So many rows at a time."""
        return self.checkpoint.pieces(self.stored_name, rows)


def stored_model(checkpoint: Checkpoint, on_progress: Progress = silent) -> nn.Module:
    """The model of an open source in eval mode, to be run within `widened` while the source is open.

    Args:
        checkpoint: of a model of transformers.
        on_progress: told of each tensor, in bytes.

    Raises:
        UsageError: a parameter that is not finite.
        SourceError: a buffer whose value is not known.
    """
    model: Any = copy.deepcopy(checkpoint.skeleton())
    infos, names = checkpoint.tensors(), stored_names(model)
    held = _held({name: infos[name] for name in names})
    total, done = sum(info.nbytes for info in infos.values()), 0
    for name, aliases in names.items():
        is_parameter = isinstance(tensor_of(model, name), nn.Parameter)
        if is_parameter and name not in held:
            value: Tensor = _Unread.of(checkpoint, name)
        else:
            value = _value(checkpoint, name, is_parameter=is_parameter, is_widened=held.get(name, False))
        for alias in aliases:
            _set(model, alias, value)
        done += infos[name].nbytes
        on_progress("loading the model to sample from", done, total)
    _fill_buffers(model, checkpoint)
    ready: nn.Module = model.eval()
    return ready


def _value(checkpoint: Checkpoint, name: str, *, is_parameter: bool, is_widened: bool) -> Tensor:
    value = checkpoint.read(name)
    if is_parameter:
        check_finite(name, value)
    value = value.float() if is_widened else value
    return nn.Parameter(value, requires_grad=False) if is_parameter else value


def _held(infos: Mapping[str, TensorInfo]) -> dict[str, bool]:
    """The tensors that are held, in the model's order first those that are widened once: of these, True."""
    sizes = {name: info.nbytes // info.dtype.itemsize for name, info in infos.items()}
    held, values, room = {}, HELD, KEPT
    for name, info in infos.items():
        if is_narrow(info.dtype) and sizes[name] <= values and 4 * sizes[name] <= room:
            held[name] = True
            values -= sizes[name]
            room -= 4 * sizes[name]
    for name, info in infos.items():
        # Of numbers alone there are no pieces, and nothing tells integers that were not read from others.
        is_whole = not info.shape or not info.dtype.is_floating_point
        if name not in held and (info.nbytes <= room or is_whole):
            held[name] = False
            room -= info.nbytes
    return held


def _fill_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Those that no source holds."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            known = checkpoint.transient(name)
            if known is None:
                raise SourceError(
                    f"{checkpoint.label}: the value of the buffer '{name}' is not known without running the "
                    "model's own set-up; calibrate with 'none'"
                )
            _set(model, name, known)


def _set(model: nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held: Any = owner._parameters if isinstance(value, nn.Parameter) else owner._buffers
    held[leaf] = value


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within it, torch multiplies float32 activations with the model's weights in float32.

    Those that lie in the source are read as they are needed, narrower ones widened.
    """
    tensors = (*model.parameters(), *model.buffers())
    is_plain = not any(is_narrow(each.dtype) or isinstance(each, _Unread) for each in tensors)
    with nullcontext() if is_plain else _Widened():
        yield


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        # A token takes thousands of calls, nearly all without such an operand: this has to be quick.
        given = list(_tensors((args, kwargs.values())))
        if any(isinstance(each, _Unread) for each in given):
            if function in _FORM:
                return function(*args, **kwargs)
            if function is F.embedding and len(args) > 1 and _is_plain(*args[2:], **kwargs):
                return _embedding(*args[:2])
            args, kwargs = pytree.tree_map_only(_Unread, _read, (args, kwargs))
        if function is F.embedding:
            return _wide(function(*args, **kwargs))
        if any(is_narrow(each.dtype) for each in given) and any(
            each.dtype is torch.float32 for each in given
        ):
            args, kwargs = pytree.tree_map_only(Tensor, _wide, (args, kwargs))
        return function(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, ValuesView)):
            yield from _tensors(value)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether values of it are floats of less than 32 bits."""
    return dtype.is_floating_point and dtype.itemsize < 4


def _read(tensor: Tensor) -> Tensor:
    return tensor.read() if isinstance(tensor, _Unread) else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if is_narrow(tensor.dtype) else tensor


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's
    x = _wide(_read(input))
    bias = None if bias is None else _wide(_read(bias))
    if not is_narrow(weight.dtype):
        return F.linear(x, _read(weight), bias)
    rows = max(1, PIECE // weight.shape[-1])
    pieces = weight.pieces(rows) if isinstance(weight, _Unread) else weight.split(rows)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for i, piece in enumerate(pieces):
        out[..., i * rows : i * rows + len(piece)] = F.linear(x, piece.float())
    return out if bias is None else out + bias


def _is_plain(padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> bool:
    """Whether a lookup does nothing but look up: the row for padding matters for gradients alone."""
    del padding_idx
    return max_norm is None


def _embedding(ids: Tensor, weight: _Unread) -> Tensor:
    """Rows of a table of which a piece at a time is read."""
    rows, start = max(1, PIECE // weight.shape[-1]), 0
    dtype = torch.float32 if is_narrow(weight.dtype) else weight.dtype
    out = torch.full((*ids.shape, weight.shape[-1]), torch.nan, dtype=dtype)
    for piece in weight.pieces(rows):
        inside = (ids >= start) & (ids < start + len(piece))
        out[inside] = piece[ids[inside] - start].to(dtype)
        start += len(piece)
    return out
