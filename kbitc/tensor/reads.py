"""Views of a packed weight, and what multiplies by them: the aten calls that models' functions are made of.

    W[a:b]   W.chunk(3)   W.view(h, d, in)   W.to(x.dtype)   W * s   x @ any of these   weight_norm(W, g)

The one thing to know: a view costs nothing and is read at the matmul, packed where a kernel has its form:
rows of the packed matrix, along their features or across them. What no kernel has a form for is dequantized
for that one call: it is right, and it is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.kernels import reference
from kbitc.kernels.ops import has_kernels
from kbitc.tensor.geometry import Geometry
from kbitc.tensor.kbit_tensor import READS, KbitTensor

aten, kbit = torch.ops.aten, torch.ops.kbit


class Part(NamedTuple):
    """A view as rows and columns of the packed matrix, or its transpose.

    Attributes:
        packed: the rows, ``(rows, in_features)``.
        first, last: columns of them.
        is_turned: the view is ``(columns, rows)``.
    """

    packed: Packed
    first: int
    last: int
    is_turned: bool

    @property
    def is_full(self) -> bool:
        """Whether all columns are there."""
        return self.last - self.first == self.packed.in_features


def dense(value: Any) -> Any:
    """A packed weight dequantized, anything else as it is."""
    return value.laid_out() if isinstance(value, KbitTensor) else value


def _dense_view(weight: KbitTensor, dtype: torch.dtype) -> Tensor:
    """The same in another dtype; of a matrix that is a part of the packed one, that part alone."""
    is_matrix = weight.factor is None and weight.dim() == 2 and not weight.is_stored_turned
    part = part_of(weight.packed, weight.placement()) if is_matrix else None
    if part is None:
        return weight.laid_out(dtype)
    rows: Tensor = kbit.dequantize(*part.packed.operands(), dtype)[:, part.first : part.last]
    return rows.t() if part.is_turned else rows


def rows_of(packed: Packed, start: int, stop: int) -> Packed:
    """Rows ``start`` to ``stop`` of a weight, experts one after another, as ``(rows, in_features)``.

    What is packed is not copied; double-quantized scales are read, unless the rows are all there are.
    """
    if (start, stop) == (0, packed.planes[..., 0].numel()):
        return packed if packed.planes.dim() == 2 else _reshaped(packed, (stop,))
    if packed.scale_codebook is not None:
        plain = reference.plain_scales(packed.operands())
        packed = replace(packed, scales=plain.scales, scale_codebook=None, scale_absmax=None, scale_mean=None)
    flat = _reshaped(packed, (-1,))
    parts: dict[str, Any] = {
        name: value[start:stop] for name, value in reference.row_tensors(flat.operands()).items()
    }
    return replace(flat, **parts)


def _reshaped(packed: Packed, lead: tuple[int, ...]) -> Packed:
    """The same rows in other groups."""
    parts = reference.row_tensors(packed.operands())
    grouped: dict[str, Any] = {name: value.reshape(*lead, value.shape[-1]) for name, value in parts.items()}
    return replace(packed, **grouped)


def part_of(packed: Packed, geometry: Geometry) -> Part | None:
    """A view of two dimensions as a part of the packed matrix; None if it is none."""
    features = packed.in_features
    (m, n), (down, across) = geometry.size, geometry.stride
    if across == 1 and (down == features or m == 1):
        rows, columns, is_turned = m, n, False
    elif down == 1 and (across == features or n == 1):
        rows, columns, is_turned = n, m, True
    else:
        return None
    row, first = divmod(geometry.offset, features)
    if first + columns > features:
        return None
    return Part(rows_of(packed, row, row + rows), first, first + columns, is_turned)


def _mm(x: Tensor, weight: Tensor) -> Any:
    """``x @ weight`` of matrices, one of them packed."""
    if isinstance(x, KbitTensor):
        if isinstance(weight, KbitTensor):
            return aten.mm(dense(x), dense(weight))
        return _mm(weight.t(), aten.t(x)).t()
    assert isinstance(weight, KbitTensor)
    if weight.factor is not None:
        return _scaled_mm(x, weight, weight.factor)
    part = part_of(weight.packed, weight.placement())
    if part is None or x.shape[0] == 0:
        return x @ weight.dequantize(x.dtype)
    if not part.is_turned:
        out = kbit.input_grad(x, *part.packed.operands())
        return out if part.is_full else out[:, part.first : part.last]
    if not part.is_full:
        x = F.pad(x, (part.first, part.packed.in_features - part.last))
    return kbit.linear(x, *part.packed.operands(), None)


def _scaled_mm(x: Tensor, weight: KbitTensor, factor: Tensor) -> Any:
    """The same where the weight is a packed one times a factor of each row, of each column or of all."""
    factor, bare = factor.to(x.dtype), weight.viewed(weight.placement())
    if factor.stride(0) == 0 or factor.shape[0] == 1:
        return _mm(x, bare) * factor[0]
    if factor.stride(1) == 0 or factor.shape[1] == 1:
        return _mm(x * factor[:, 0], bare)
    return x @ weight.dequantize(x.dtype)


def _bmm(x: Tensor, weight: Tensor) -> Any:
    """``x @ weight`` of batches of matrices, one of them packed."""
    if isinstance(x, KbitTensor):
        if isinstance(weight, KbitTensor):
            return aten.bmm(dense(x), dense(weight))
        return _bmm(weight.mT, aten.transpose(x, 1, 2)).mT
    assert isinstance(weight, KbitTensor)
    batch, rows = x.shape[:2]
    (count, *_), (step, *_), _ = layout = weight.placement()
    is_same = weight.factor is None or weight.factor.stride(0) == 0 or count == 1
    if is_same and (step == 0 or count == 1):
        return _mm(x.flatten(0, 1), aten.select(weight, 0, 0)).view(batch, rows, -1)
    groups = _groups(weight.packed, layout) if weight.factor is None and x.numel() else None
    if groups is None:
        return torch.bmm(x, weight.dequantize(x.dtype))
    steps = torch.arange(1, batch + 1, device=x.device, dtype=torch.int32) * rows
    call = kbit.grouped_linear if groups.is_turned else kbit.grouped_input_grad
    return call(x.flatten(0, 1), *groups.packed.operands(), steps).view(batch, rows, -1)


def _groups(packed: Packed, layout: Geometry) -> Part | None:
    """A view of three dimensions as groups of whole rows, one after another; None if it is none."""
    (count, *size), (step, *stride), offset = layout
    part = part_of(packed, Geometry(tuple(size), tuple(stride), offset))
    rows = size[1] if part is not None and part.is_turned else size[0]
    if part is None or not part.is_full or step != rows * packed.in_features:
        return None
    start = offset // packed.in_features
    return part._replace(packed=_reshaped(rows_of(packed, start, start + count * rows), (count, rows)))


def _added(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``beta * addend + alpha * product``."""

    def call(addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        is_packed = isinstance(left, KbitTensor) or isinstance(right, KbitTensor)
        out = product(left, right) if is_packed else left @ right
        out = out if alpha == 1 else alpha * out
        return out if beta == 0 else out + (dense(addend) if beta == 1 else beta * dense(addend))

    return call


def _add_to(total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``beta * total + alpha * left @ right``, in place."""
    if isinstance(total, KbitTensor):
        return NotImplemented
    return (total if beta == 1 else total.mul_(beta)).add_(_mm(left, right), alpha=alpha)


def _mv(weight: Tensor, vector: Tensor) -> Any:
    return _mm(weight, vector[:, None])[:, 0]


def _view(func: Any) -> Callable[..., Any]:
    """A view by the same call of where its elements lie, or a dense one where it would be none."""

    def call(weight: KbitTensor, *args: Any, **kwargs: Any) -> Any:
        moved = weight.placement().moved(func, args, kwargs)
        factor = weight.factor
        if moved is None or (factor is not None and _moved_factor(factor, func, args, kwargs) is None):
            return func(weight.dequantize().contiguous(), *args, **kwargs)
        factors = None if factor is None else func(factor, *args, **kwargs)
        # torch wants a view to be an inference tensor where its base is one, and nowhere else.
        with torch.inference_mode(weight.is_inference()):
            if isinstance(moved, Geometry):
                return weight.viewed(moved, factors)
            each = enumerate(moved)
            return [weight.viewed(part, None if factors is None else factors[i]) for i, part in each]

    return call


def _select(weight: KbitTensor, dim: int, index: int) -> Any:
    """One row of a matrix as a dense vector, looked up; of anything else a view."""
    if not weight.is_plain or weight.dim() != 2 or dim not in (0, -2):
        return _view(aten.select.int)(weight, dim, index)
    with torch.inference_mode(weight.is_inference()):  # as for a view
        if not has_kernels(weight.packed.planes):
            return aten.select(weight.dequantize(), dim, index)
        row = torch.tensor(range(weight.shape[0])[index], device=weight.device)
        return kbit.embedding(row, *weight.operands(), weight.dtype)


def _moved_factor(factor: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
    return Geometry(tuple(factor.shape), factor.stride()).moved(func, args, kwargs)


def _times(weight: Any, other: Any) -> Any:
    """The weight times a number or a tensor that broadcasts to it: a factor of the view."""
    if isinstance(other, KbitTensor):
        if isinstance(weight, KbitTensor):
            return aten.mul(dense(weight), dense(other))
        weight, other = other, weight
    if not isinstance(other, Tensor):
        other = torch.full((), other, dtype=weight.dtype, device=weight.device)
    if not other.is_floating_point() or torch.broadcast_shapes(weight.shape, other.shape) != weight.shape:
        return aten.mul(weight.dequantize(), other)
    factor = other.expand(weight.shape)
    if weight.factor is not None:
        # Both are small where they are expanded: what is the same along a dimension stays so.
        factor = (_core(weight.factor) * _core(factor)).expand(weight.shape)
    out = weight.viewed(weight.placement(), factor)
    return out if other.dtype == weight.dtype or other.dim() == 0 else out.to(other.dtype)


def _sum(weight: Any, other: Any, *, alpha: float = 1) -> Any:
    """A weight and a dense tensor of its shape, as DoRA adds them to measure rows: dense, for that call."""
    if not isinstance(weight, Tensor) or not isinstance(other, Tensor) or weight.shape != other.shape:
        return NotImplemented
    if isinstance(weight, KbitTensor) == isinstance(other, KbitTensor):
        return NotImplemented
    return aten.add(dense(weight), dense(other), alpha=alpha)


def _core(factor: Tensor) -> Tensor:
    for dim in range(factor.dim()):
        if factor.stride(dim) == 0:
            factor = factor.narrow(dim, 0, 1)
    return factor


def _over(weight: Any, other: Any, **kwargs: Any) -> Any:
    if isinstance(other, KbitTensor) or kwargs:
        return aten.div(dense(weight), dense(other), **kwargs)
    return _times(weight, 1 / other)


def _weight_norm(v: Any, g: Tensor, dim: int = 0) -> tuple[Any, Tensor]:
    """``v * g / |v|``: the norms are of the dequantized weight."""
    norms = torch.norm_except_dim(dense(v), 2, dim)
    return _times(v, g / norms), norms


def _on_dense(func: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return func(*torch.utils._pytree.tree_map(dense, args), **kwargs)

    return call


def _multiplied(func: Any, product: Callable[..., Any]) -> Callable[..., Any]:
    """By kernels, where there are some; else the very call on the dequantized weight."""

    def call(*args: Any, **kwargs: Any) -> Any:
        weights = [value for value in args if isinstance(value, KbitTensor)]
        if has_kernels(weights[0].packed.planes):
            return product(*args, **kwargs)
        others = [value for value in args if isinstance(value, Tensor) and not isinstance(value, KbitTensor)]
        dtype = next((other.dtype for other in others if other.is_floating_point()), weights[0].dtype)
        dense_args = (_dense_view(v, dtype) if isinstance(v, KbitTensor) else v for v in args)
        return func(*dense_args, **kwargs)

    return call


VIEWS = (
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
    *(aten.view.default, aten._unsafe_view.default, aten.slice.Tensor, aten.select.int),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
)
RESIZED = (
    *(aten.upsample_nearest1d, aten.upsample_linear1d, aten.upsample_nearest2d, aten.upsample_bilinear2d),
    *(aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
)
"""What fits a table of positions to an image of another size."""

DENSE = (
    *(aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.cat.default),
    *(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.convolution.default),
    aten.sum.dim_IntList,  # the gradient of a factor
    aten.pow.Tensor_Scalar,  # distances to the rows of a codebook
    aten.grid_sampler_2d.default,
    *(getattr(packet, overload) for packet in RESIZED for overload in ("default", "vec")),
)
"""Read by dequantizing: nothing that a model does at every step, but for what no kernel has a form for."""

READS.update({func: _view(func) for func in VIEWS})
READS.update({func: _on_dense(func) for func in DENSE})
READS[aten.select.int] = _select
READS[aten.add.Tensor] = _sum
READS[aten._reshape_alias.default] = lambda weight, size, _: aten.view(weight, size)
PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.mv.default: _mv,
    aten.addmm.default: _added(_mm),
    aten.addmm_.default: _add_to,
    aten.addmv.default: _added(_mv),
    aten.baddbmm.default: _added(_bmm),
    aten.addbmm.default: _added(lambda left, right: _bmm(left, right).sum(0)),
    aten.mul.Tensor: _times,
    aten.mul.Scalar: _times,
    aten.div.Tensor: _over,
    aten.div.Scalar: _over,
    aten.neg.default: lambda weight: _times(weight, -1.0),
    aten._weight_norm_interface.default: _weight_norm,
}
READS.update({func: _multiplied(func, product) for func, product in PRODUCTS.items()})
