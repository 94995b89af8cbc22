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
``feed_back_strip`` wanted (columns, rows)  -> codes, values, errors  errors passed on to later columns
``descend_strip``   slope, values           -> codes, values, steps   the best for all others as they are
``input_grad``, ``grouped_input_grad``      gradients with respect to x
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from kbitc.formats import scale_search
from kbitc.formats.bit_planes import row_bytes
from kbitc.formats.encode import encode_rows
from kbitc.formats.packed import NUMBER_FIELDS, TENSOR_FIELDS, Operands
from kbitc.kernels import reference, rounding
from kbitc.kernels.cpu import build as native

IN_SCHEMAS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int"}
WEIGHT = ", ".join(f"{IN_SCHEMAS[hint]} {name}" for name, hint in get_type_hints(Operands).items())
"""The part of a schema that is a weight: ``Tensor planes, Tensor scales, ... int block``."""

OPERANDS = len(Operands._fields)
TENSORS = len(TENSOR_FIELDS)
NUMBERS = len(NUMBER_FIELDS)

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


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels made for a tensor's device are there; what is traced or without data counts as if."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return True
    return native.load() if tensor.device.type == "cpu" else tensor.is_cuda and bool(_load_triton())


def define_op(
    name: str, signature: str, fake: Callable[..., Any], *, is_native: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``kbit::name``, with the decorated function as its kernel wherever there is no better one.

    ``is_native``: ``kernels/cpu`` has a kernel for it. It registers itself when its library loads, which
    the first op on the CPU sees to; from then on the dispatcher goes straight to it.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in args if isinstance(value, Tensor)]
            if any(value.layout is not torch.strided for value in tensors):  # sparse ones have no kernels
                return getattr(torch.ops.kbit, name)(*(_strided(value) for value in args), **kwargs)
            tensor = tensors[0]
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


def _strided(value: Any) -> Any:
    """A sparse tensor dense, anything else as it is."""
    is_sparse = isinstance(value, Tensor) and value.layout is not torch.strided
    return value.to_dense() if is_sparse else value


def _check_input(name: str, x: Tensor, features: int) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != features:
        raise RuntimeError(
            f"kbit::{name}: expected a float input whose last dimension is {features}, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )


def _fake_linear(x: Tensor, *rest: Any) -> Tensor:
    weight, _ = Operands.split(rest)
    _check_input("linear", x, weight.in_features)
    return x.new_empty(*x.shape[:-1], weight.planes.shape[0])


@define_op("linear", f"(Tensor x, {WEIGHT}, Tensor? bias=None) -> Tensor", _fake_linear)
def _linear(x: Tensor, *rest: Any) -> Tensor:
    weight, bias = Operands.split(rest)
    _check_input("linear", x, weight.in_features)
    return reference.linear(x, weight, bias)


@define_op("linear_int8", f"(Tensor x, {WEIGHT}, Tensor? bias=None) -> Tensor", _fake_linear)
def _linear_int8(x: Tensor, *rest: Any) -> Tensor:
    weight, bias = Operands.split(rest)
    _check_input("linear_int8", x, weight.in_features)
    return reference.linear_int8(x, weight, bias)


def split_weights(weights: Sequence[Tensor | None], numbers: Sequence[int]) -> list[Operands]:
    """The operands of each weight, from the flat lists that ``linears`` takes."""
    count = len(numbers) // NUMBERS
    if count == 0 or len(numbers) != NUMBERS * count or len(weights) != TENSORS * count:
        raise RuntimeError(
            f"kbit::linears: expected {TENSORS} tensors and {NUMBERS} numbers for each weight, "
            f"got {len(weights)} and {len(numbers)}"
        )
    each: list[Operands] = []
    for i in range(count):
        flat: list[Any] = [*weights[TENSORS * i :][:TENSORS], *numbers[NUMBERS * i :][:NUMBERS]]
        each.append(Operands(*flat))
    return each


def _fake_linears(
    x: Tensor,
    weights: Sequence[Tensor | None],
    numbers: Sequence[int],
    biases: Sequence[Tensor | None],
) -> Tensor:
    del biases
    each = split_weights(weights, numbers)
    for weight in each:
        _check_input("linears", x, weight.in_features)
    return x.new_empty(*x.shape[:-1], sum(weight.planes.shape[0] for weight in each))


@define_op(
    "linears", "(Tensor x, Tensor?[] weights, int[] numbers, Tensor?[] biases) -> Tensor", _fake_linears
)
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
    each = split_weights(weights, numbers)
    return torch.cat(
        [torch.ops.kbit.linear(x, *weight, bias) for weight, bias in zip(each, biases, strict=True)],
        dim=-1,
    )


def _fake_input_grad(grad: Tensor, *operands: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], Operands(*operands).in_features)


@define_op("input_grad", f"(Tensor grad, {WEIGHT}) -> Tensor", _fake_input_grad)
def _input_grad(grad: Tensor, *operands: Any) -> Tensor:
    weight = Operands(*operands)
    _check_input("input_grad", grad, weight.planes.shape[0])
    return reference.input_grad(grad, weight)


def _fake_embedding(ids: Tensor, *rest: Any) -> Tensor:
    weight, dtype = Operands.split(rest)
    return weight.planes.new_empty(*ids.shape, weight.in_features, dtype=dtype)


@define_op("embedding", f"(Tensor ids, {WEIGHT}, ScalarType dtype) -> Tensor", _fake_embedding)
def _embedding(ids: Tensor, *rest: Any) -> Tensor:
    return reference.embedding(ids, *Operands.split(rest))


def _fake_grouped_linear(x: Tensor, *rest: Any) -> Tensor:
    weight, _ = Operands.split(rest)
    return x.new_empty(x.shape[0], weight.planes.shape[1])


@define_op("grouped_linear", f"(Tensor x, {WEIGHT}, Tensor offsets) -> Tensor", _fake_grouped_linear)
def _grouped_linear(x: Tensor, *rest: Any) -> Tensor:
    weight, offsets = Operands.split(rest)
    _check_input("grouped_linear", x, weight.in_features)
    return reference.grouped_linear(x, weight, offsets)


def _fake_grouped_input_grad(grad: Tensor, *rest: Any) -> Tensor:
    weight, _ = Operands.split(rest)
    return grad.new_empty(grad.shape[0], weight.in_features)


@define_op(
    "grouped_input_grad", f"(Tensor grad, {WEIGHT}, Tensor offsets) -> Tensor", _fake_grouped_input_grad
)
def _grouped_input_grad(grad: Tensor, *rest: Any) -> Tensor:
    return reference.grouped_input_grad(grad, *Operands.split(rest))


def _fake_dequantize(*given: Any) -> Tensor:
    weight, dtype = Operands.split(given)
    return weight.planes.new_empty(*weight.planes.shape[:-1], weight.in_features, dtype=dtype)


@define_op("dequantize", f"({WEIGHT}, ScalarType dtype) -> Tensor", _fake_dequantize)
def _dequantize(*given: Any) -> Tensor:
    return reference.dequantize(*Operands.split(given))


def _fake_select(experts: Tensor, *operands: Any) -> list[Tensor]:
    weight = Operands(*operands)
    scales = torch.float32 if weight.scale_codebook is not None else weight.scales.dtype
    return [
        part.new_empty(*experts.shape, *part.shape[1:], dtype=scales if field == "scales" else part.dtype)
        for field, part in reference.row_tensors(weight).items()
    ]


@define_op("select", f"(Tensor experts, {WEIGHT}) -> Tensor[]", _fake_select, is_native=False)
def _select(experts: Tensor, *operands: Any) -> list[Tensor]:
    at, weight = experts.long(), Operands(*operands)
    if weight.scale_codebook is not None:
        weight = reference.plain_scales(weight)
    return [part[at] for part in reference.row_tensors(weight).values()]


def _fake_encode(
    rows: Tensor, scales: Tensor, zeros: Any, codebook: Tensor, index: Any, bits: int, block: int
) -> Tensor:
    del scales, zeros, codebook, index, block
    return rows.new_empty(rows.shape[0], row_bytes(rows.shape[1], bits), dtype=torch.uint8)


@define_op(
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


@define_op(
    "search_scales",
    "(Tensor rows, Tensor importance, Tensor scales, Tensor? zeros, Tensor codebook, Tensor ratios, "
    "int block, int rounds) -> (Tensor, Tensor)",
    _fake_search,
)
def _search_scales(*given: Any) -> tuple[Tensor, Tensor]:
    scales, zeros = scale_search.search_scales(*given)
    return scales, scales.new_empty(0) if zeros is None else zeros


LEVELS = (
    "Tensor blocks, Tensor scales, Tensor inverse, Tensor? zeros, "
    "Tensor codebook, Tensor bounds, ScalarType kept"
)
"""The part of a schema that is `kbitc.kernels.rounding.Levels`."""


def _fake_strip(given: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del rest
    return (
        given.new_empty(given.shape, dtype=torch.uint8),
        given.new_empty(given.shape),
        given.new_empty(given.shape),
    )


@define_op(
    "feed_back_strip",
    f"(Tensor wanted, Tensor factor, {LEVELS}) -> (Tensor codes, Tensor values, Tensor errors)",
    _fake_strip,
)
def _feed_back_strip(wanted: Tensor, factor: Tensor, *levels: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rounding.feed_back_strip(wanted, factor, rounding.Levels(*levels))


@define_op(
    "descend_strip",
    f"(Tensor slope, Tensor start, Tensor moments, {LEVELS}) -> (Tensor codes, Tensor values, Tensor steps)",
    _fake_strip,
)
def _descend_strip(
    slope: Tensor, start: Tensor, moments: Tensor, *levels: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return rounding.descend_strip(slope, start, moments, rounding.Levels(*levels))


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
    weight, bias = Operands.split(rest)
    wants_x, *_, wants_last = ctx.needs_input_grad
    grad_x = torch.ops.kbit.input_grad(grad, *weight) if wants_x else None
    is_given = len(rest) > OPERANDS
    grad_bias = None
    if bias is not None and wants_last:
        grad_bias = grad.flatten(0, -2).sum(0).to(bias.dtype)
    return (grad_x, *[None] * OPERANDS, *([grad_bias] if is_given else []))


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
    each = split_weights([next(saved) if is_present else None for is_present in ctx.present], ctx.numbers)
    parts = grad.split([weight.planes.shape[0] for weight in each], dim=-1)
    grad_x = sum(
        torch.ops.kbit.input_grad(part.contiguous(), *weight)
        for part, weight in zip(parts, each, strict=True)
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
