"""A source's model that runs in float32 on weights of the source's own dtype.

The one thing to know: beyond a first gigabyte a weight is widened when an operation reads it, some rows at
a time. Memory is that gigabyte and the source, once, and numbers are those of a model in float32.
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
from kbitc.checkpoint.finite import check_finite
from kbitc.checkpoint.names import stored_names, tensor_of
from kbitc.errors import SourceError
from kbitc.graph.context import Progress, silent

HELD = 1 << 28  # values that are widened once and held, which takes 1 GB and halves the time of a token
PIECE = 1 << 21  # values that are widened at once: 8 MB, so that they stay in a processor's cache


def stored_model(checkpoint: Checkpoint, on_progress: Progress = silent) -> nn.Module:
    """The model of an open source in eval mode, to be run within `widened`.

    Args:
        checkpoint: of a model of transformers.
        on_progress: told of each tensor, in bytes.

    Raises:
        UsageError: a parameter that is not finite.
        SourceError: a buffer whose value is not known.
    """
    model: Any = copy.deepcopy(checkpoint.skeleton())
    infos = checkpoint.tensors()
    total = sum(info.nbytes for info in infos.values())
    done, room = 0, HELD
    for name, aliases in stored_names(model).items():
        tensor = checkpoint.read(name)
        done += infos[name].nbytes
        is_parameter = isinstance(tensor_of(model, name), nn.Parameter)
        if is_parameter:
            check_finite(name, tensor)
        if is_narrow(tensor) and tensor.numel() <= room:
            room -= tensor.numel()
            tensor = tensor.float()
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for alias in aliases:
            _set(model, alias, value)
        on_progress("loading the model to sample from", done, total)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            known = checkpoint.transient(name)
            if known is None:
                raise SourceError(
                    f"{checkpoint.label}: the value of the buffer '{name}' is not known without running the "
                    "model's own set-up; calibrate with 'none'"
                )
            _set(model, name, known)
    ready: nn.Module = model.eval()
    return ready


def _set(model: nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held: Any = owner._parameters if isinstance(value, nn.Parameter) else owner._buffers
    held[leaf] = value


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within it, torch multiplies float32 activations with the model's narrower weights, in float32."""
    is_wide = not any(map(is_narrow, (*model.parameters(), *model.buffers())))
    with nullcontext() if is_wide else _Widened():
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
        if function is F.embedding:
            return _wide(function(*args, **kwargs))
        # A token takes thousands of calls, nearly all without a narrow operand: this has to be quick.
        given = list(_tensors((args, kwargs.values())))
        if any(map(is_narrow, given)) and any(each.dtype is torch.float32 for each in given):
            args, kwargs = pytree.tree_map_only(Tensor, _wide, (args, kwargs))
        return function(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, ValuesView)):
            yield from _tensors(value)


def is_narrow(tensor: Tensor) -> bool:
    """Whether its values are floats of less than 32 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if is_narrow(tensor) else tensor


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's
    x = _wide(input)
    bias = None if bias is None else _wide(bias)
    if not is_narrow(weight):
        return F.linear(x, weight, bias)
    rows = max(1, PIECE // weight.shape[-1])
    pieces = [F.linear(x, weight[i : i + rows].float()) for i in range(0, len(weight), rows)]
    out = torch.cat(pieces, dim=-1)
    return out if bias is None else out + bias
