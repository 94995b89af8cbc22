"""``torch.ops.kbit.*``: schemas, fake kernels, gradients, and the reference implementations.

The one thing to know: an op takes a weight as plain tensors (planes, scales, codebook, ...), in the
order of `kbitc.formats.packed.Operands`, and never a data type's name. A backend registers its kernel
for its device against the same op; where it has none, the reference here runs.

``linear``          x (..., in)             -> (..., rows)            x @ W.T + bias
``linear_int8``     x (..., in)             -> (..., rows)            the same in integers: LLM.int8()
``linears``         x (..., in)             -> (..., sum of rows)     the same of several W, side by side
``embedding``       ids (...)               -> (..., in)              W[ids]
``grouped_linear``  x (tokens, in), offsets -> (tokens, rows)         x[group e] @ W[e].T
``dequantize``                              -> (*lead, rows, in)      W
``select``          the weight, expert ids  -> planes, scales, zeros, outliers of those experts
``encode``          rows, scales            -> planes                 nearest codes, packed
``search_scales``   rows, importance        -> scales, zeros          least weighted squared error
``input_grad``, ``grouped_input_grad``      gradients with respect to x
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from kbitc.formats import scale_search
from kbitc.formats.bit_planes import row_bytes
from kbitc.formats.encode import encode_rows
from kbitc.formats.packed import TENSOR_FIELDS, Operands
from kbitc.kernels import reference
from kbitc.kernels.cpu import build as native

WEIGHT = (
    "Tensor planes, Tensor scales, Tensor codebook, Tensor? zeros, Tensor? scale_codebook, "
    "Tensor? scale_absmax, Tensor? scale_mean, Tensor? outlier_values, Tensor? outlier_index, "
    "int in_features, int bits, int block"
)
TENSORS = len(TENSOR_FIELDS)
OPERANDS = len(Operands._fields)

library = torch.library.Library("kbit", "DEF")


@functools.cache
def _load_triton() -> Mapping[str, Callable[..., Any]]:
    """Register ``kernels/gpu`` for CUDA and ROCm tensors; the kernels by the name of their op.

    Here and not at import, because importing Triton takes long and the CPU has no use for it. Without
    Triton a warning, and the slow reference kernels.
    """
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "kbitc: packed weights are on a GPU and triton is not installed, so plain PyTorch does the work, "
            "many times slower; install it with: pip install 'kbitc[triton]'",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    launch = importlib.import_module("kbitc.kernels.gpu.launch")
    for name, kernel in launch.KERNELS.items():
        library.impl(name, kernel, "CUDA")
    return dict(launch.KERNELS)


def _op(
    name: str, signature: str, fake: Callable[..., Any], *, is_native: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``kbit::name``, with the decorated function as its kernel wherever there is no better one.

    ``is_native``: ``kernels/cpu`` has a kernel for it. It registers itself when its library loads, which
    the first op on the CPU sees to; from then on the dispatcher goes straight to it.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            tensor = next(value for value in args if isinstance(value, Tensor))
            if tensor.device.type == "cpu" and native.load():
                return getattr(torch.ops.kbit, name)(*args, **kwargs)
            if tensor.is_cuda and name in _load_triton():
                return getattr(torch.ops.kbit, name)(*args, **kwargs)
            return kernel(*args, **kwargs)

        library.define(f"{name}{signature}")
        library.impl(name, first if is_native else kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kbit::{name}", fake, lib=library)
        return kernel

    return register


def _check_input(name: str, x: Tensor, features: int) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != features:
        raise RuntimeError(
            f"kbit::{name}: expected a float input whose last dimension is {features}, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )


def _weight(flat: Sequence[Any]) -> tuple[Operands, Sequence[Any]]:
    """The operands that a flat argument list begins with, and what follows them."""
    return Operands(*flat[:OPERANDS]), flat[OPERANDS:]


def _with_bias(flat: Sequence[Any]) -> tuple[Operands, Tensor | None]:
    operands, rest = _weight(flat)
    return operands, rest[0] if rest else None


def _fake_linear(x: Tensor, *flat: Any) -> Tensor:
    operands, _ = _weight(flat)
    _check_input("linear", x, operands.in_features)
    return x.new_empty(*x.shape[:-1], operands.planes.shape[0])


@_op("linear", f"(Tensor x, {WEIGHT}, Tensor? bias=None) -> Tensor", _fake_linear)
def _linear(x: Tensor, *flat: Any) -> Tensor:
    operands, bias = _with_bias(flat)
    _check_input("linear", x, operands.in_features)
    return reference.linear(x, operands, bias)


@_op("linear_int8", f"(Tensor x, {WEIGHT}, Tensor? bias=None) -> Tensor", _fake_linear)
def _linear_int8(x: Tensor, *flat: Any) -> Tensor:
    operands, bias = _with_bias(flat)
    _check_input("linear_int8", x, operands.in_features)
    return reference.linear_int8(x, operands, bias)


def _split_weights(weights: Sequence[Tensor | None], numbers: Sequence[int]) -> list[Operands]:
    """The operands of each weight, from the flat lists that ``linears`` takes."""
    count = len(numbers) // 3
    if count == 0 or len(numbers) != 3 * count or len(weights) != TENSORS * count:
        raise RuntimeError(
            f"kbit::linears: expected {TENSORS} tensors and 3 numbers for each weight, "
            f"got {len(weights)} and {len(numbers)}"
        )
    tensors: Sequence[Any] = weights
    return [
        Operands(*tensors[TENSORS * i : TENSORS * (i + 1)], *numbers[3 * i : 3 * (i + 1)])
        for i in range(count)
    ]


def _fake_linears(
    x: Tensor,
    weights: Sequence[Tensor | None],
    numbers: Sequence[int],
    biases: Sequence[Tensor | None],
) -> Tensor:
    del biases
    each = _split_weights(weights, numbers)
    for operands in each:
        _check_input("linears", x, operands.in_features)
    return x.new_empty(*x.shape[:-1], sum(operands.planes.shape[0] for operands in each))


@_op("linears", "(Tensor x, Tensor?[] weights, int[] numbers, Tensor?[] biases) -> Tensor", _fake_linears)
def _linears(
    x: Tensor,
    weights: Sequence[Tensor | None],
    numbers: Sequence[int],
    biases: Sequence[Tensor | None],
) -> Tensor:
    """Several weights with one input (queries, keys and values): one call, the results side by side.

    The weights may have different formats. ``weights`` holds the nine tensors of each, flat;
    ``numbers`` its in_features, bits and block; ``biases`` one entry a weight.
    """
    each = _split_weights(weights, numbers)
    return torch.cat(
        [torch.ops.kbit.linear(x, *operands, bias) for operands, bias in zip(each, biases, strict=True)],
        dim=-1,
    )


@_op(
    "input_grad",
    f"(Tensor grad, {WEIGHT}) -> Tensor",
    lambda grad, *flat: grad.new_empty(*grad.shape[:-1], Operands(*flat).in_features),
)
def _input_grad(grad: Tensor, *flat: Any) -> Tensor:
    operands = Operands(*flat)
    _check_input("input_grad", grad, operands.planes.shape[0])
    return reference.input_grad(grad, operands)


def _fake_embedding(ids: Tensor, *flat: Any) -> Tensor:
    operands, (dtype,) = _weight(flat)
    return operands.planes.new_empty(*ids.shape, operands.in_features, dtype=dtype)


@_op("embedding", f"(Tensor ids, {WEIGHT}, ScalarType dtype) -> Tensor", _fake_embedding)
def _embedding(ids: Tensor, *flat: Any) -> Tensor:
    operands, (dtype,) = _weight(flat)
    return reference.embedding(ids, operands, dtype)


@_op(
    "grouped_linear",
    f"(Tensor x, {WEIGHT}, Tensor offsets) -> Tensor",
    lambda x, planes, *_: x.new_empty(x.shape[0], planes.shape[1]),
)
def _grouped_linear(x: Tensor, *flat: Any) -> Tensor:
    operands, (offsets,) = _weight(flat)
    _check_input("grouped_linear", x, operands.in_features)
    return reference.grouped_linear(x, operands, offsets)


@_op(
    "grouped_input_grad",
    f"(Tensor grad, {WEIGHT}, Tensor offsets) -> Tensor",
    lambda grad, *flat: grad.new_empty(grad.shape[0], _weight(flat)[0].in_features),
)
def _grouped_input_grad(grad: Tensor, *flat: Any) -> Tensor:
    operands, (offsets,) = _weight(flat)
    return reference.grouped_input_grad(grad, operands, offsets)


def _fake_dequantize(*flat: Any) -> Tensor:
    operands, (dtype,) = _weight(flat)
    return operands.planes.new_empty(*operands.planes.shape[:-1], operands.in_features, dtype=dtype)


@_op("dequantize", f"({WEIGHT}, ScalarType dtype) -> Tensor", _fake_dequantize)
def _dequantize(*flat: Any) -> Tensor:
    operands, (dtype,) = _weight(flat)
    return reference.dequantize(*operands, dtype=dtype)


def _of_experts(operands: Operands) -> list[Tensor]:
    """The tensors of a weight that have a leading dimension of experts."""
    parts = (operands.planes, operands.scales, operands.zeros, operands.outlier_values)
    return [part for part in parts if part is not None]


def _fake_select(experts: Tensor, *flat: Any) -> list[Tensor]:
    operands = Operands(*flat)
    if operands.scale_codebook is not None:  # read into float32
        operands = operands._replace(scales=operands.scales.to(torch.float32))
    return [part.new_empty(*experts.shape, *part.shape[1:]) for part in _of_experts(operands)]


@_op(
    "select",
    f"(Tensor experts, {WEIGHT}) -> Tensor[]",
    _fake_select,
    is_native=False,
)
def _select(experts: Tensor, *flat: Any) -> list[Tensor]:
    at, operands = experts.long(), Operands(*flat)
    if operands.scale_codebook is not None:
        operands = reference.plain_scales(operands)
    return [part[at] for part in _of_experts(operands)]


def _fake_encode(
    rows: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor,
    outlier_index: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    del scales, zeros, codebook, outlier_index, block
    return rows.new_empty(rows.shape[0], row_bytes(rows.shape[1], bits), dtype=torch.uint8)


@_op(
    "encode",
    "(Tensor rows, Tensor scales, Tensor? zeros, Tensor codebook, Tensor? outlier_index, int bits, int block)"
    " -> Tensor",
    _fake_encode,
)
def _encode(*given: Any) -> Tensor:
    return encode_rows(*given)


def _fake_search(rows: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any) -> Any:
    del rows, importance, rest
    new = torch.empty_like(scales, dtype=torch.float32)
    return new, new.new_empty(0) if zeros is None else torch.empty_like(new)


@_op(
    "search_scales",
    "(Tensor rows, Tensor importance, Tensor scales, Tensor? zeros, Tensor codebook, Tensor ratios, "
    "int block, int rounds) -> (Tensor, Tensor)",
    _fake_search,
)
def _search_scales(*given: Any) -> tuple[Tensor, Tensor]:
    scales, zeros = scale_search.search_scales(*given)
    return scales, scales.new_empty(0) if zeros is None else zeros


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep everything but ``x``: its gradient needs the weight alone."""
    del output
    _, *rest = inputs
    ctx.tensors = [isinstance(value, Tensor) for value in rest]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in rest]
    ctx.save_for_backward(*(value for value in rest if isinstance(value, Tensor)))


def _restore(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [
        next(saved) if is_tensor else plain for is_tensor, plain in zip(ctx.tensors, ctx.plain, strict=True)
    ]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rest = _restore(ctx)
    wanted = ctx.needs_input_grad
    grad_x = torch.ops.kbit.input_grad(grad, *rest[:OPERANDS]) if wanted[0] else None
    grad_bias = None
    if len(rest) > OPERANDS and rest[OPERANDS] is not None and wanted[OPERANDS + 1]:
        grad_bias = grad.flatten(0, -2).sum(0).to(rest[OPERANDS].dtype)
    return (grad_x, *[None] * OPERANDS, *([grad_bias] if len(rest) > OPERANDS else []))


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rest = _restore(ctx)
    return (torch.ops.kbit.grouped_input_grad(grad, *rest), *[None] * (OPERANDS + 1))


def _save_linears(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weights: flat, with gaps, as ``linears`` takes them."""
    del output
    _, weights, ctx.numbers, biases = inputs
    if any(bias is not None and bias.requires_grad for bias in biases):
        raise RuntimeError("kbit::linears has no gradient for its biases; call kbit::linear for each weight")
    ctx.present = [value is not None for value in weights]
    ctx.save_for_backward(*(value for value in weights if value is not None))


def _linears_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    each = _split_weights([next(saved) if is_present else None for is_present in ctx.present], ctx.numbers)
    parts = grad.split([operands.planes.shape[0] for operands in each], dim=-1)
    grad_x = sum(
        torch.ops.kbit.input_grad(part.contiguous(), *operands)
        for part, operands in zip(parts, each, strict=True)
    )
    return grad_x, None, None, None


torch.library.register_autograd("kbit::linears", _linears_backward, setup_context=_save_linears, lib=library)
torch.library.register_autograd("kbit::linear", _linear_backward, setup_context=_save, lib=library)
# Straight through the rounding of x: the gradient of the product with the dequantized weight.
torch.library.register_autograd("kbit::linear_int8", _linear_backward, setup_context=_save, lib=library)
torch.library.register_autograd("kbit::grouped_linear", _grouped_backward, setup_context=_save, lib=library)


def _see_through(name: str, body: Callable[..., Any] | None = None) -> None:
    """Let a compiler that traces ``kbit::name`` on a GPU see its kernels, as `torch.library.triton_op` does.

    Not where a size is not known yet, because the kernels depend on the number of rows: there the op stays
    one node, as it does in an exported program and on a CPU.

    Args:
        body: what the op does in terms of others; else its kernel of ``kernels/gpu``.
    """

    def trace(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0]
        is_known = all(isinstance(size, int) for size in first.shape)
        if not (is_known and first.is_cuda) or torch.compiler.is_exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        kernel = body or _load_triton().get(name)
        if kernel is None:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return kernel(*args, **kwargs)

    torch.library.register_torch_dispatch(f"kbit::{name}", FunctionalTensorMode, trace, lib=library)


_see_through("linears", _linears)
for _name in (
    "linear",
    "linear_int8",
    "input_grad",
    "embedding",
    "grouped_linear",
    "grouped_input_grad",
    "dequantize",
):
    _see_through(_name)
