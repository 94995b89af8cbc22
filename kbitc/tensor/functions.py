"""What a packed weight serves: the functions with which models read weights, sent to ``torch.ops.kbit.*``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.kernels.ops import has_kernels
from kbitc.kernels.reference import groups
from kbitc.tensor.kbit_tensor import FUNCTIONS, KbitTensor, transpose
from kbitc.tensor.refusals import CHANGED, check_frozen, no_storage

# A handler answers NotImplemented where it has no form: `kbitc.tensor.reads` then serves its parts.

# Each handler asks by itself whether there are kernels: without them addmm and bmm are the model's own calls,
# while linear and grouped_mm go to the op, which reads by rows or experts, unless the model stores the weight
# turned and so adds in another order. One wrapper for all would also cost every F.linear a call.

# Functions: what a model does with a weight.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    if isinstance(input, KbitTensor) or not isinstance(weight, KbitTensor):
        return NotImplemented
    if weight.packed.planes.dim() != 2 or not weight.is_plain:  # weight.dim() would cost a microsecond
        return NotImplemented
    if weight.is_stored_turned and not has_kernels(weight.packed.planes):
        return F.linear(input, weight.laid_out(input.dtype), bias)
    op = torch.ops.kbit.linear_int8 if weight.activations == "int8" else torch.ops.kbit.linear
    return _call(op, input, weight, bias)


def _call(op: Any, input: Tensor, weight: KbitTensor, last: Tensor | None) -> Any:  # noqa: A002
    """An op's product; past its layer of gradients, three times a small product, where nothing needs one."""
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad or (last is not None and last.requires_grad)
    )
    if needs_grad or torch.compiler.is_compiling():
        return op(input, *weight.operands(), last)
    with torch._C._AutoDispatchBelowAutograd():
        return op(input, *weight.operands(), last)


def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:  # noqa: A002
    """``x @ W`` for a 2-D W that is packed along its first dimension, or a batch of experts."""
    if out is not None:
        if isinstance(out, KbitTensor):
            raise NotImplementedError(f"matmul into a packed weight: {CHANGED}")
        product = torch.matmul(input, other)
        return out.resize_(product.shape).copy_(product)
    if isinstance(input, KbitTensor):
        dims = (input.dim(), other.dim())
        if isinstance(other, KbitTensor) or not _is_matrix(input) or (dims[0] != 2 and dims != (3, 3)):
            return NotImplemented
        product = _matmul(other, input.mT) if dims[1] == 1 else _matmul(other.mT, input.mT)
        return product if product is NotImplemented or dims[1] == 1 else product.mT
    if not _is_matrix(other):
        return NotImplemented
    if other.dim() == 3:
        return _bmm(input, other) if input.dim() == 3 and other.is_transposed else NotImplemented
    return _linear(input, other.mT)


def _is_matrix(weight: Tensor) -> TypeGuard[KbitTensor]:
    """Whether it is what is packed or its transpose, and no other view."""
    return isinstance(weight, KbitTensor) and weight.geometry is None and weight.factor is None


def _bmm(input: Tensor, weight: KbitTensor) -> Tensor:  # noqa: A002
    """``(experts, m, in) @ (experts, in, rows)``: each expert is a group of m rows."""
    if not has_kernels(weight.packed.planes):
        each = (torch.bmm(input[i : i + 1], _expert(weight, i, input)[None]) for i in range(len(input)))
        return torch.cat(list(each))
    experts, rows = input.shape[0], input.shape[1]
    offsets = torch.arange(1, experts + 1, device=input.device, dtype=torch.int32) * rows
    out: Tensor = grouped_mm(input.flatten(0, 1), weight, offs=offsets)
    return out.view(experts, rows, -1)


def _expert(weight: KbitTensor, expert: int, like: Tensor) -> Tensor:
    """One matrix of a batch, dense, of another tensor's dtype."""
    one: KbitTensor = _getitem(weight, expert)
    return one.laid_out(like.dtype)


def _addmm(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: None = None,
) -> Any:
    if isinstance(input, KbitTensor):
        return NotImplemented
    if _is_matrix(mat2) and not isinstance(mat1, KbitTensor) and out is None:
        if not has_kernels(mat2.packed.planes):
            return torch.addmm(input, mat1, mat2.laid_out(mat1.dtype), beta=beta, alpha=alpha)
        if (beta, alpha) == (1, 1) and input.dim() == 1:
            return _linear(mat1, mat2.mT, input)
    product = _matmul(mat1, mat2, out=out)
    return product if product is NotImplemented else beta * input + alpha * product


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # the signature of F.embedding
    sparse: bool = False,
) -> Any:
    del padding_idx, norm_type, scale_grad_by_freq, sparse  # they matter to gradients alone
    if max_norm is not None:
        raise NotImplementedError("F.embedding with max_norm changes its weight; a packed one is frozen")
    if not isinstance(weight, KbitTensor) or weight.dim() != 2 or not weight.is_plain:
        return NotImplemented
    out: Tensor = torch.ops.kbit.embedding(input, *weight.operands(), weight.dtype)
    return out


def grouped_mm(
    input: Tensor,  # noqa: A002
    mat2: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of the input, sorted by expert, times their expert's packed weight."""
    is_matrix = _is_matrix(mat2) and mat2.dim() == 3
    if not isinstance(mat2, KbitTensor) or not is_matrix or not mat2.is_transposed or offs is None:
        raise NotImplementedError("grouped_mm needs a packed (experts, in_features, rows) weight and offs")
    if mat2.is_stored_turned and not has_kernels(mat2.packed.planes):
        out = input.new_zeros(len(input), mat2.shape[-1])
        for expert, rows in groups(offs):
            out[rows] = input[rows] @ _expert(mat2, expert, input)
    else:
        out = _call(torch.ops.kbit.grouped_linear, input, mat2, offs)
    if bias is not None:
        out = out + bias
    return out if out_dtype is None else out.to(out_dtype)


def _getitem(weight: KbitTensor, at: Any) -> Any:
    """Experts of a 3-D weight: ``weight[i]``, ``weight[tensor]``."""
    is_view = isinstance(at, (tuple, slice, type(None), type(...)))
    if weight.dim() != 3 or is_view or not _is_matrix(weight):
        return NotImplemented
    experts = torch.as_tensor(at, device=weight.packed.planes.device)
    if experts.is_floating_point() or experts.dtype == torch.bool:
        return NotImplemented
    parts = iter(torch.ops.kbit.select(experts, *weight.operands()))
    packed = weight.packed
    picked = Packed(
        planes=next(parts),
        scales=next(parts),
        codebook=packed.codebook,
        zeros=None if packed.zeros is None else next(parts),
        scale_codebook=None,
        scale_absmax=None,
        scale_mean=None,
        outlier_values=None if packed.outlier_values is None else next(parts),
        outlier_index=packed.outlier_index,
        spec=packed.spec,
        in_features=packed.in_features,
    )
    return weight._like(picked)


def _permute(weight: KbitTensor, *dims: Any) -> Any:
    order = [dim % weight.dim() for dim in (dims if isinstance(dims[0], int) else dims[0])]
    *lead, rows, features = range(weight.dim())
    if order not in ([*lead, rows, features], [*lead, features, rows]):
        return NotImplemented
    return weight if order[-1] == features else weight._turned()


def _reshape(weight: KbitTensor, *shape: Any) -> Any:
    """A view of the same shape, as some models write it."""
    if isinstance(shape[0], torch.dtype):
        raise NotImplementedError(f"the bytes of a packed weight cannot be seen as {shape[0]}")
    size = shape if isinstance(shape[0], int) else tuple(shape[0])
    return weight if tuple(size) == tuple(weight.shape) else NotImplemented


def _einsum(equation: str, *operands: Any) -> Any:
    """``...i,oi->...o`` and its like: a matmul with a 2-D weight, spelled out."""
    given = operands if len(operands) == 2 else tuple(operands[0])
    inputs, _, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(given) == len(names) == 2:
        at = 0 if isinstance(given[0], KbitTensor) else 1
        x, weight, shared, packed = given[1 - at], names[at], names[1 - at][-1:], given[at]
        free = weight.replace(shared, "") if shared else ""
        is_matmul = len(weight) == 2 and len(free) == 1 and out == names[1 - at][:-1] + free
        if is_matmul and not isinstance(x, KbitTensor) and _is_matrix(packed):
            return _linear(x, packed.mT if weight[0] == shared else packed)
    return NotImplemented


def _deepcopy(weight: KbitTensor, memo: dict[int, Any]) -> KbitTensor:
    if id(weight) in memo:
        known: KbitTensor = memo[id(weight)]
        return known
    copied: KbitTensor = weight._like(weight.packed.map(torch.clone))
    if isinstance(weight, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, requires_grad=False)  # type: ignore[assignment]
    memo[id(weight)] = copied
    return copied


def _requires_grad(weight: KbitTensor, requires_grad: bool = True) -> KbitTensor:
    """As `torch.Tensor.requires_grad_`: a packed weight is never trained.

    ``load_state_dict(assign=True)`` asks it to be what the dense weight was in its place: it stays frozen.
    """
    caller = sys._getframe(2).f_code
    if caller is not torch.nn.Module._load_from_state_dict.__code__:
        check_frozen(requires_grad)
    return weight


def _untyped_storage(weight: KbitTensor) -> Any:
    """For torch itself, which asks for it to make fake tensors; to others it would be one of no bytes."""
    if not sys._getframe(2).f_globals.get("__name__", "").startswith("torch."):
        no_storage()
    with torch._C.DisableTorchFunctionSubclass():
        return weight.untyped_storage()


SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.bmm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda weight, x: _matmul(x, weight),
    Tensor.addmm: _addmm,
    Tensor.__getitem__: _getitem,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.requires_grad_: _requires_grad,
    Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    Tensor.numpy: no_storage,
    Tensor.storage: no_storage,
    Tensor.untyped_storage: _untyped_storage,
    torch.transpose: transpose,
    Tensor.transpose: transpose,
    torch.permute: _permute,
    Tensor.permute: _permute,
    torch.reshape: _reshape,
    Tensor.reshape: _reshape,
    Tensor.view: _reshape,
    torch.einsum: _einsum,
    torch.t: KbitTensor._turned,
    Tensor.t: KbitTensor._turned,
    Tensor.T.__get__: transpose,  # type: ignore[attr-defined]
    Tensor.mT.__get__: KbitTensor._turned,  # type: ignore[attr-defined]
}


for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):
        SERVED[getattr(_owner, _name)] = grouped_mm

FUNCTIONS.update(SERVED)
