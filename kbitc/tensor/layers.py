"""Convolutions over patches and recurrent layers, written as the matmuls that they are.

    conv(x, W), stride = kernel   linear(patches of x, W.flatten(1))
    lstm, gru, rnn                linear(all steps, W_ih), then linear(h, W_hh) for each step

The one thing to know: packed models compute with these functions, and captured graphs are rewritten by the
same ones, so that what is matched there is what runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from kbitc.kernels.ops import has_kernels
from kbitc.tensor.kbit_tensor import FUNCTIONS, KbitTensor


def is_patchwise(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution meets each place of its input in one patch at most: then it is a matmul."""
    one = all(size == 1 for size in kernel)
    if isinstance(padding, str):
        no_padding = padding == "valid" or one
    else:
        no_padding = not any(_each(padding, len(kernel)))
    steps = zip(kernel, _each(stride, len(kernel)), _each(dilation, len(kernel)), strict=True)
    return groups == 1 and no_padding and all(k == 1 or (k == s and d == 1) for k, s, d in steps)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))


def patch_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any) -> Tensor:
    """A convolution that :func:`is_patchwise`.

    Args:
        x: ``(batch, channels, *places)``, or without the batch.
        weight: ``(features, channels, *kernel)``.
        bias: ``(features,)``.
        stride: of each dimension, or of all.

    Returns:
        ``(batch, features, *patches)``, contiguous.
    """
    kernel, count = weight.shape[2:], weight.dim() - 2
    batched = x if x.dim() == count + 2 else x.unsqueeze(0)
    for dim, (size, step) in enumerate(zip(kernel, _each(stride, count), strict=True), start=2):
        if size > 1:
            batched = batched.narrow(dim, 0, batched.shape[dim] // size * size)
        elif step > 1:
            batched = batched[(*[slice(None)] * dim, slice(None, None, step))]
    if all(size == 1 for size in kernel):
        patches = batched.movedim(1, -1)
    else:
        for dim in reversed(range(count)):
            batched = batched.unflatten(2 + dim, (-1, kernel[dim]))
        places, inside = range(2, 2 + 2 * count, 2), range(3, 3 + 2 * count, 2)
        patches = batched.permute(0, *places, 1, *inside).flatten(count + 1)
    out = F.linear(patches, weight.flatten(1), bias).movedim(-1, 1).contiguous()
    return out if x.dim() == count + 2 else out.squeeze(0)


def _convolution(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    kernel = weight.shape[2:]
    if isinstance(input, KbitTensor) or not is_patchwise(kernel, stride, padding, dilation, groups):
        return NotImplemented
    return patch_convolution(input, weight, bias, stride)


def _packed_convolution(input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:  # noqa: A002
    is_plain = isinstance(weight, KbitTensor) and not has_kernels(weight.packed.planes)
    return NotImplemented if is_plain else _convolution(input, weight, *rest, **options)


# Recurrent layers. A cell is (projected input, state, its weights) to the next state.

_State = tuple[Tensor, ...]
_Cell = Callable[[Tensor, _State, Sequence[Any]], _State]


def _lstm_step(projected: Tensor, state: _State, weights: Sequence[Any]) -> _State:
    h, c = state
    _, w_hh, _, b_hh, w_hr = weights
    i, f, g, o = (projected + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if w_hr is None else F.linear(h, w_hr), c


def _gru_step(projected: Tensor, state: _State, weights: Sequence[Any]) -> _State:
    (h,) = state
    _, w_hh, _, b_hh, _ = weights
    x_r, x_z, x_n = projected.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((h - n) * z + n,)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> _Cell:
    def step(projected: Tensor, state: _State, weights: Sequence[Any]) -> _State:
        _, w_hh, _, b_hh, _ = weights
        return (activation(projected + F.linear(state[0], w_hh, b_hh)),)

    return step


CELLS: dict[str, _Cell] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


def _direction(
    step: _Cell, data: Tensor, sizes: list[int], state: _State, weights: Sequence[Any], *, is_reverse: bool
) -> tuple[Tensor, _State]:
    """One layer in one direction: ``data`` (all steps of all sequences, in), ``sizes`` sequences a step."""
    projected = F.linear(data, weights[0], weights[2]).split(sizes)
    places = range(len(sizes))
    out: list[Tensor] = [data] * len(sizes)
    for t in reversed(places) if is_reverse else places:
        active = tuple(part[: sizes[t]] for part in state)
        fresh = step(projected[t], active, weights)
        out[t] = fresh[0]
        ended = sizes[t] < state[0].shape[0]
        pairs = zip(fresh, state, strict=True)
        state = tuple(torch.cat([new, old[sizes[t] :]]) for new, old in pairs) if ended else fresh
    return torch.cat(out), state


def recurrent(kind: str, *given: Any) -> tuple[Tensor, ...]:
    """``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu`` with their arguments by position.

    Args:
        kind: which.
        given: ``(input, state, weights, has_biases, layers, dropout, is_training, is_bidirectional,
            is_batch_first)``, or ``(data, sizes, state, ...)`` of a packed sequence.

    Returns:
        The outputs, and the last state of each layer and direction: h, for an LSTM also c.
    """
    data, is_packed = given[0], not isinstance(given[3], bool)
    state, weights, has_biases, layers, dropout, is_training, is_bidirectional, *rest = given[1 + is_packed :]
    is_batch_first = bool(rest and rest[0])
    if is_packed:
        sizes = [int(size) for size in given[1]]
    else:
        data = data.transpose(0, 1) if is_batch_first else data
        sizes = [data.shape[1]] * data.shape[0]
        steps, data = data.shape[0], data.flatten(0, 1)
    states = list(state) if kind == "lstm" else [state]
    cells = list(_cells(weights, has_biases=has_biases, count=layers * (1 + is_bidirectional)))
    last: list[_State] = []
    for layer in range(layers):
        outs = []
        for is_reverse in (False, True)[: 1 + is_bidirectional]:
            at = len(last)
            begin = tuple(part[at] for part in states)
            out, end = _direction(CELLS[kind], data, sizes, begin, cells[at], is_reverse=is_reverse)
            outs.append(out)
            last.append(end)
        data = torch.cat(outs, -1) if is_bidirectional else outs[0]
        if dropout and is_training and layer < layers - 1:
            data = F.dropout(data, dropout)
    if not is_packed:
        data = data.unflatten(0, (steps, sizes[0]))
        data = data.transpose(0, 1) if is_batch_first else data
    return (data, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _cells(weights: Sequence[Any], *, has_biases: bool, count: int) -> Any:
    """The weights of each layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr."""
    each = len(weights) // count
    for start in range(0, len(weights), each):
        own = list(weights[start : start + each])
        biases = own[2:4] if has_biases else [None, None]
        projection = own[2 + 2 * has_biases :]
        yield [*own[:2], *biases, *(projection or [None])]


def recurrent_cell(kind: str, x: Tensor, state: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    """``torch.lstm_cell``, ``gru_cell``, ``rnn_tanh_cell`` or ``rnn_relu_cell``: one step."""
    states = tuple(state) if kind == "lstm" else (state,)
    fresh = CELLS[kind](F.linear(x, w_ih, b_ih), states, (w_ih, w_hh, b_ih, b_hh, None))
    return fresh if kind == "lstm" else fresh[0]


def _layer(kind: str) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        return recurrent(kind, *given)

    return call


def _one_step(kind: str) -> Callable[..., Any]:
    def call(x: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        return recurrent_cell(kind, x, hx, w_ih, w_hh, b_ih, b_hh)

    return call


def _served(function: Callable[..., Any], by_matmuls: Callable[..., Any]) -> Callable[..., Any]:
    """By matmuls, where there are kernels for them; else torch's own on dequantized weights."""

    def call(*given: Any) -> Any:
        weights = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, KbitTensor)]
        if has_kernels(weights[0].packed.planes):
            return by_matmuls(*given)
        return function(*pytree.tree_map_only(KbitTensor, KbitTensor.laid_out, given))

    return call


FUNCTIONS.update(dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _packed_convolution))
for _kind in CELLS:
    _whole, _cell = getattr(torch, _kind), getattr(torch, f"{_kind}_cell")
    FUNCTIONS[_whole] = _served(_whole, _layer(_kind))
    FUNCTIONS[_cell] = _served(_cell, _one_step(_kind))


def as_matmuls(name: str, args: Sequence[Any]) -> Callable[..., Any] | None:
    """A function of the same arguments that computes a call by linears and matmuls.

    Args:
        name: of the aten call, "aten.conv2d".
        args: its values by position, with defaults.

    Returns:
        The function; None for a call that is no matmul, or that has a matcher of its own.
    """
    short = name.removeprefix("aten.")
    if short in CELLS:
        return _layer(short) if isinstance(args[3], bool) else None
    if short.removesuffix("_cell") in CELLS:
        return _one_step(short.removesuffix("_cell"))
    if short in ("conv1d", "conv2d", "conv3d"):
        return _convolution if is_patchwise(args[1].shape[2:], args[3], args[4], args[5], args[6]) else None
    if short == "convolution":
        stride, padding, dilation, is_turned, _, groups = args[3:9]
        is_matmul = not is_turned and is_patchwise(args[1].shape[2:], stride, padding, dilation, groups)
        return _plain_convolution if is_matmul else None
    return _PRODUCTS.get(short)


def _plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, *_: Any) -> Tensor:
    return patch_convolution(x, weight, bias, stride)


def _tensordot(left: Tensor, right: Tensor, over_left: Sequence[int], over_right: Sequence[int]) -> Tensor:
    first, second = ([dim % t.dim() for dim in over] for t, over in ((left, over_left), (right, over_right)))
    rows = [dim for dim in range(left.dim()) if dim not in first]
    columns = [dim for dim in range(right.dim()) if dim not in second]
    shape = [*(left.shape[dim] for dim in rows), *(right.shape[dim] for dim in columns)]
    inner = [left.shape[dim] for dim in first]
    size = torch.Size(inner).numel()
    out = left.permute(*rows, *first).reshape(-1, size) @ right.permute(*second, *columns).reshape(size, -1)
    return out.reshape(shape)


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "mv": torch.matmul,
    "addmv": lambda addend, weight, x, beta, alpha: beta * addend + alpha * torch.matmul(weight, x),
    "inner": lambda left, right: torch.matmul(left, right.mT),
    "tensordot": _tensordot,
}
"""Other ways to write a linear."""
