"""`KbitTensor`: a packed weight that stands in a model where its dense parameter stood.

The one thing to know: it is a thin traceable wrapper around the plain tensors of `Packed`. It sends
`F.linear`, `addmm`, `matmul`, `F.embedding` and grouped matmuls to ``torch.ops.kbit.*``, lets itself
be moved, copied and transposed, and does nothing else: any other operation is an error, not a
silent dequantization. With it a compiled Hugging Face model is still that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kbitc.blockwise import TENSOR_FIELDS, Operands, Packed
from kbitc.kernels import ops
from kbitc.spec import Spec, parse

aten = torch.ops.aten


class KbitTensor(Tensor):
    """A packed 2-D or 3-D weight.

    Attributes:
        packed: the plain tensors, spec and width; its rows are always *output* features.
        is_transposed: the logical tensor is ``(..., in_features, rows)``: GPT-2's Conv1D.
        activations: "float", or "int8" for a linear in integers (`kbitc.activations`).
    """

    packed: Packed
    is_transposed: bool
    activations: str

    @staticmethod
    def __new__(
        cls: type[KbitTensor],
        packed: Packed,
        dtype: torch.dtype,
        *,
        is_transposed: bool = False,
        activations: str = "float",
    ) -> KbitTensor:
        """Wrap ``packed`` as a tensor whose logical dtype, that of embeddings, is ``dtype``."""
        shape = packed.shape
        if is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        self: KbitTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=packed.planes.device, requires_grad=False
        )
        self.packed = packed
        self.is_transposed = is_transposed
        self.activations = activations
        for name in TENSOR_FIELDS:
            setattr(self, f"_{name}", getattr(packed, name))
        return self

    @property
    def spec(self) -> Spec:
        """The format."""
        return self.packed.spec

    def operands(self) -> Operands:
        """The weight as the arguments of a ``kbit::`` op."""
        return self.packed.operands()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The dense weight, of ``dtype`` (by default the logical one), in the logical shape."""
        dense: Tensor = torch.ops.kbit.dequantize(*self.operands(), dtype or self.dtype)
        return dense.mT if self.is_transposed else dense

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        form = ", transposed" if self.is_transposed else ""
        return f"KbitTensor({self.spec}, shape={tuple(self.shape)}, dtype={self.dtype}{form})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Spec, int, torch.dtype, bool, str]]:
        names = [f"_{name}" for name in self.packed.tensors()]
        packed = self.packed
        return names, (packed.spec, packed.in_features, self.dtype, self.is_transposed, self.activations)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        context: tuple[Spec, int, torch.dtype, bool, str],
        outer_size: Iterable[int],
        outer_stride: Iterable[int],
    ) -> KbitTensor:
        del outer_size, outer_stride
        spec, in_features, dtype, is_transposed, activations = context
        fields = {name: inner.get(f"_{name}") for name in TENSOR_FIELDS}
        packed = Packed(**fields, spec=spec, in_features=in_features)  # type: ignore[arg-type]
        return KbitTensor(packed, dtype, is_transposed=is_transposed, activations=activations)

    def _like(self, packed: Packed, dtype: torch.dtype | None = None) -> KbitTensor:
        return KbitTensor(
            packed, dtype or self.dtype, is_transposed=self.is_transposed, activations=self.activations
        )

    def _turned(self) -> KbitTensor:
        return KbitTensor(
            self.packed, self.dtype, is_transposed=not self.is_transposed, activations=self.activations
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub forgets that it is a class method
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = _MOVES.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} is not defined on a packed weight. kbitc packs weights that are read by "
                "linear, addmm, matmul, embedding or grouped matmul; for anything else call "
                ".dequantize() first, or leave this weight alone (spec fp16) when compiling"
            )
        return handler(*args, **(kwargs or {}))


def quantize(
    weight: Tensor,
    spec: Spec | str,
    *,
    quantizer: str = "absmax",
    importance: Tensor | None = None,
    outliers: Tensor | None = None,
    is_transposed: bool = False,
    name: str = "weight",
) -> KbitTensor:
    """Quantize and pack a weight.

    Args:
        weight: (rows, in_features) or (experts, rows, in_features); any float dtype.
        spec: format, for example "nf4:64" or "int3:128+zp".
        quantizer: how scales are chosen: "absmax" (the largest magnitude of each block) or "weighted"
            (least squared error, weighted by ``importance``).
        importance: (in_features,) or (experts, in_features): E[x²] of the inputs, for "weighted".
        outliers: sorted input features to keep at 16 bits; see ``kbitc.blockwise.quantize``.
        is_transposed: weight is (..., in_features, rows), as in GPT-2's Conv1D.
        name: how error messages call the tensor.

    Returns:
        A tensor of the same logical shape and dtype; ``.dequantize(dtype)`` reads it back.

    Raises:
        UsageError: a bad spec, shape, dtype, or a weight that is not finite.

    >>> quantize(torch.eye(2), "int4:32").dequantize().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    source = weight.mT if is_transposed else weight
    packed = ops.quantize(
        source, spec, quantizer=quantizer, importance=importance, outliers=outliers, name=name
    )
    return KbitTensor(packed, weight.dtype, is_transposed=is_transposed)


# Functions: what a model does with a weight.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    if isinstance(input, KbitTensor) or not isinstance(weight, KbitTensor):
        raise NotImplementedError("F.linear takes a packed tensor as its weight alone")
    if weight.packed.planes.dim() != 2 or weight.is_transposed:  # weight.dim() would cost a microsecond
        raise NotImplementedError(
            f"F.linear needs a (rows, in_features) weight; this one is {tuple(weight.shape)}, "
            f"packed along dimension {weight.dim() - 2 if weight.is_transposed else weight.dim() - 1}"
        )
    op = torch.ops.kbit.linear_int8 if weight.activations == "int8" else torch.ops.kbit.linear
    out: Tensor = op(input, *weight.operands(), bias)
    return out


def _matmul(input: Tensor, other: Tensor, *, out: None = None) -> Tensor:  # noqa: A002
    """``x @ W`` for a 2-D W that is packed along its first dimension, or a batch of experts."""
    if out is not None:
        raise NotImplementedError("matmul with a packed weight has no out=")
    if isinstance(input, KbitTensor) and isinstance(other, KbitTensor):
        raise NotImplementedError("matmul of two packed weights")
    if isinstance(input, KbitTensor):
        if input.dim() == 2 and other.dim() > 2:
            return _matmul(other.mT, input.mT).mT
        if input.dim() == 3 and other.dim() == 3:
            return _bmm(other.mT, input.mT).mT  # type: ignore[arg-type]
        if input.dim() == 2 and other.dim() == 2:
            return _matmul(other.mT, input.mT).mT
        if input.dim() == 2 and other.dim() == 1:
            return _matmul(other, input.mT)
        raise NotImplementedError(f"matmul of a packed {tuple(input.shape)} with {tuple(other.shape)}")
    if isinstance(other, KbitTensor) and other.dim() == 3 and input.dim() == 3:
        return _bmm(input, other)
    return _linear(input, other.mT)


def _bmm(input: Tensor, weight: KbitTensor) -> Tensor:  # noqa: A002
    """``(experts, m, in) @ (experts, in, rows)``: each expert is a group of m rows."""
    experts, rows = input.shape[0], input.shape[1]
    offsets = torch.arange(1, experts + 1, device=input.device, dtype=torch.int32) * rows
    out: Tensor = _grouped_mm(input.flatten(0, 1), weight, offs=offsets)
    return out.view(experts, rows, -1)


def _addmm(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: None = None,
) -> Tensor:
    if (beta, alpha) == (1, 1) and input.dim() == 1 and out is None and isinstance(mat2, KbitTensor):
        return _linear(mat1, mat2.mT, input)
    product = _matmul(mat1, mat2, out=out)
    return beta * input + alpha * product


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # the signature of F.embedding
    sparse: bool = False,
) -> Tensor:
    del padding_idx, norm_type, scale_grad_by_freq, sparse  # they matter to gradients alone
    if max_norm is not None:
        raise NotImplementedError("F.embedding with max_norm changes its weight; a packed one is frozen")
    if not isinstance(weight, KbitTensor) or weight.dim() != 2 or weight.is_transposed:
        raise NotImplementedError("F.embedding needs a weight that is packed along its features")
    out: Tensor = torch.ops.kbit.embedding(input, *weight.operands(), weight.dtype)
    return out


def _grouped_mm(
    input: Tensor,  # noqa: A002
    mat2: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if not isinstance(mat2, KbitTensor) or mat2.dim() != 3 or not mat2.is_transposed or offs is None:
        raise NotImplementedError("grouped_mm needs a packed (experts, in_features, rows) weight and offs")
    out: Tensor = torch.ops.kbit.grouped_linear(input, *mat2.operands(), offs)
    if bias is not None:
        out = out + bias
    return out if out_dtype is None else out.to(out_dtype)


def _getitem(weight: KbitTensor, at: Any) -> KbitTensor:
    """Experts of a 3-D weight: ``weight[i]``, ``weight[tensor]``."""
    if weight.dim() != 3 or isinstance(at, (tuple, slice, type(None), type(...))):
        raise NotImplementedError(
            f"indexing a packed {tuple(weight.shape)} with {at!r}: only whole experts can be picked"
        )
    experts = torch.as_tensor(at, device=weight.packed.planes.device)
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise NotImplementedError("experts are picked by integer indices")
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


def _transpose(weight: KbitTensor, dim0: int = 0, dim1: int = 1) -> KbitTensor:
    dims = {dim0 % weight.dim(), dim1 % weight.dim()}
    if dims != {weight.dim() - 2, weight.dim() - 1}:
        raise NotImplementedError(f"transposing dimensions {dim0} and {dim1} of a packed weight")
    return weight._turned()


def _permute(weight: KbitTensor, *dims: Any) -> KbitTensor:
    order = [dim % weight.dim() for dim in (dims if isinstance(dims[0], int) else dims[0])]
    *lead, rows, features = range(weight.dim())
    if order not in ([*lead, rows, features], [*lead, features, rows]):
        raise NotImplementedError(f"permuting a packed weight to {order}")
    return weight if order[-1] == features else weight._turned()


def _reshape(weight: KbitTensor, *shape: Any) -> KbitTensor:
    """A view of the same shape, as some models write it."""
    size = shape if isinstance(shape[0], int) else tuple(shape[0])
    if tuple(size) != tuple(weight.shape):
        raise NotImplementedError(f"reshaping a packed {tuple(weight.shape)} to {size}")
    return weight


def _einsum(equation: str, *operands: Any) -> Tensor:
    """``...i,oi->...o`` and its like: a matmul with a 2-D weight, spelled out."""
    given = operands if len(operands) == 2 else tuple(operands[0])
    inputs, _, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(given) == len(names) == 2:
        at = 0 if isinstance(given[0], KbitTensor) else 1
        x, weight, shared, packed = given[1 - at], names[at], names[1 - at][-1:], given[at]
        free = weight.replace(shared, "") if shared else ""
        is_matmul = len(weight) == 2 and len(free) == 1 and out == names[1 - at][:-1] + free
        if is_matmul and not isinstance(x, KbitTensor):
            return _linear(x, packed.mT if weight[0] == shared else packed)
    raise NotImplementedError(f"einsum '{equation}' with a packed weight")


def _deepcopy(weight: KbitTensor, memo: dict[int, Any]) -> KbitTensor:
    if id(weight) in memo:
        found: KbitTensor = memo[id(weight)]
        return found
    copied: KbitTensor = weight._like(weight.packed.map(torch.clone))
    if isinstance(weight, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, requires_grad=False)  # type: ignore[assignment]
    memo[id(weight)] = copied
    return copied


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
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
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch.permute: _permute,
    Tensor.permute: _permute,
    torch.reshape: _reshape,
    Tensor.reshape: _reshape,
    Tensor.view: _reshape,
    torch.einsum: _einsum,
    torch.t: KbitTensor._turned,
    Tensor.t: KbitTensor._turned,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.mT.__get__: KbitTensor._turned,  # type: ignore[attr-defined]
}
for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):
        _FUNCTIONS[getattr(_owner, _name)] = _grouped_mm


# Movement: copies, devices and dtypes. The dtype is the logical one; what is stored never changes.


def _to_copy(
    weight: KbitTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: object,
) -> KbitTensor:
    if dtype is not None and not dtype.is_floating_point:
        raise NotImplementedError(f"a packed weight cannot become {dtype}; call .dequantize() first")
    moved = weight.packed.map(lambda t: t.to(device=device, non_blocking=non_blocking, copy=True))
    return weight._like(moved, dtype)


def _copy(target: KbitTensor, source: Tensor, non_blocking: bool = False) -> KbitTensor:
    if not isinstance(source, KbitTensor) or source.spec != target.spec or source.shape != target.shape:
        raise NotImplementedError("only a packed weight of the same spec and shape can be copied in")
    for name, value in target.packed.tensors().items():
        value.copy_(getattr(source.packed, name), non_blocking)
    return target


_MOVES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: weight._like(weight.packed),
    aten.alias.default: lambda weight: weight._like(weight.packed),
    aten.clone.default: lambda weight, **_: weight._like(weight.packed.map(torch.clone)),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.t.default: KbitTensor._turned,
    aten.transpose.int: _transpose,
}

torch.serialization.add_safe_globals([KbitTensor])
