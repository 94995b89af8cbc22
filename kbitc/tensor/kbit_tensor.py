"""`KbitTensor`: a packed weight that stands in a model where its dense parameter stood.

The one thing to know: it is a thin traceable wrapper around the plain tensors of `Packed`. What it serves
stands in three tables: `FUNCTIONS` (how models read a weight), `MOVES` (copies and devices) and `READS`
(views of it, and what multiplies by them); any other operation is an error, not a silent dequantization.
With it a compiled Hugging Face model is still that model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.packed import TENSOR_FIELDS, Operands, Packed
from kbitc.formats.spec import Spec, parse
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit
from kbitc.tensor.geometry import Geometry
from kbitc.tensor.refusals import CHANGED, DENSE, check_frozen, refusal

aten = torch.ops.aten

_Context: TypeAlias = tuple[Spec, int, torch.dtype, bool, str, "Geometry | None", bool]

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What a packed weight serves: `kbitc.tensor.functions` fills it, which importing the room sees to.

A handler that has no form for its arguments answers ``NotImplemented``; `READS` then gets what the function
is made of."""

READS: dict[Any, Callable[..., Any]] = {}
"""The aten calls that read a packed weight: `kbitc.tensor.reads` fills it."""


class KbitTensor(Tensor):
    """A packed 2-D or 3-D weight, or a view of one.

    Attributes:
        packed: the plain tensors, spec and width; its rows are always *output* features.
        is_transposed: the logical tensor is ``(..., in_features, rows)``: GPT-2's Conv1D.
        geometry: where its elements lie in the packed matrix, if they are not that matrix or its transpose:
            the kernel of a convolution, rows of a weight.
        factor: of the logical shape, most of its strides 0; what is read is the packed matrix times it.
        activations: "float", or "int8" for a linear in integers (`kbitc.tensor.activations`); by default as
            the spec says.
        is_stored_turned: the model's parameter, of which this may be a view, is ``(..., in_features, rows)``.
    """

    packed: Packed
    is_transposed: bool
    geometry: Geometry | None
    factor: Tensor | None
    activations: str
    is_stored_turned: bool

    @staticmethod
    def __new__(
        cls: type[KbitTensor],
        packed: Packed | KbitTensor,
        dtype: torch.dtype | None = None,
        *,
        is_transposed: bool = False,
        activations: str | None = None,
        geometry: Geometry | None = None,
        factor: Tensor | None = None,
        is_stored_turned: bool | None = None,
        requires_grad: bool = False,
    ) -> KbitTensor:
        """Wrap ``packed`` as a tensor whose logical dtype, that of embeddings, is ``dtype``.

        A packed weight is taken too: ``type(parameter)(weight, requires_grad=False)`` is how accelerate puts
        parameters into modules.

        Raises:
            UsageError: a dense tensor, or one that is to be trained.
        """
        check_frozen(requires_grad)
        if isinstance(packed, KbitTensor):
            return packed.detach()  # type: ignore[return-value]
        if isinstance(packed, Tensor):
            raise UsageError(f"a dense tensor cannot take the place of a packed weight: {CHANGED}")
        shape = packed.shape
        if geometry is not None:
            shape = geometry.size
        elif is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        self: KbitTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype or torch.float32, device=packed.planes.device, requires_grad=False
        )
        self.packed = packed
        self.is_transposed = is_transposed
        self.activations = activations or ("int8" if packed.spec.has_int8_inputs else "float")
        self.geometry = geometry
        self.factor = factor
        self.is_stored_turned = is_transposed if is_stored_turned is None else is_stored_turned
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
        if self.geometry is not None:
            dense = dense.as_strided(*self.geometry)
        elif self.is_transposed:
            dense = dense.mT
        return dense if self.factor is None else dense * self.factor.to(dense.dtype)

    def laid_out(self, dtype: torch.dtype | None = None) -> Tensor:
        """The same with a dense model's strides, with which matmuls give the same bits."""
        dense = self.dequantize(dtype)
        if not self.is_stored_turned or self.geometry is not None:
            return dense
        return dense.contiguous() if self.is_transposed else dense.mT.contiguous().mT

    @property
    def is_plain(self) -> bool:
        """Whether it is the packed matrix as it is: ``(..., rows, in_features)``."""
        return not self.is_transposed and self.geometry is None and self.factor is None

    def placement(self) -> Geometry:
        """Where its elements lie in the packed matrix."""
        return self.geometry or Geometry.of_matrix(self.packed.shape, is_transposed=self.is_transposed)

    def view_of(self) -> tuple[int, ...] | None:
        """The matrix, as the model would store it, that the shape is a view of; None where it is its own."""
        if self.geometry is None:
            return None
        plain = Geometry.of_matrix(self.packed.shape, is_transposed=self.is_transposed)
        return plain.size

    def viewed(self, geometry: Geometry, factor: Tensor | None = None) -> KbitTensor:
        """The same packed matrix, seen otherwise: a plain one where it can be.

        Args:
            geometry: where the elements of the view lie.
            factor: what they are multiplied by, of their shape.
        """
        shape = self.packed.shape
        turned = geometry == Geometry.of_matrix(shape, is_transposed=True)
        is_matrix = turned or geometry == Geometry.of_matrix(shape, is_transposed=False)
        return KbitTensor(
            self.packed,
            self.dtype,
            is_transposed=turned,
            activations=self.activations,
            geometry=None if is_matrix else geometry,
            factor=factor,
            is_stored_turned=self.is_stored_turned,
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are stored, without codebooks that weights share."""
        return self.packed.nbytes()

    def element_size(self) -> float:  # type: ignore[override]
        """Stored bytes of an element: what tells the size of a model multiplies it by their number."""
        return self.packed.nbytes() / self.numel()

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Plain tensors, numbers and the spec's text, so that ``torch.load(weights_only=True)`` reads it."""
        packed, is_parameter = self.packed, isinstance(self, torch.nn.Parameter)
        geometry = None if self.geometry is None else tuple(self.geometry)
        marks = (self.dtype, self.is_transposed, self.activations, is_parameter, geometry, self.factor)
        return restored, (dict(packed.tensors()), str(packed.spec), packed.in_features, *marks)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        form = ", transposed" if self.is_transposed else ""
        return f"KbitTensor({self.spec}, shape={tuple(self.shape)}, dtype={self.dtype}{form})"

    def __tensor_flatten__(self) -> tuple[list[str], _Context]:
        names = [f"_{name}" for name in self.packed.tensors()]
        if self.factor is not None:
            names.append("factor")
        packed = self.packed
        form = (self.is_transposed, self.activations, self.geometry, self.is_stored_turned)
        return names, (packed.spec, packed.in_features, self.dtype, *form)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        context: _Context,
        outer_size: Iterable[int],
        outer_stride: Iterable[int],
    ) -> KbitTensor:
        del outer_size, outer_stride
        spec, in_features, dtype, is_transposed, activations, geometry, is_stored_turned = context
        fields = {name: inner.get(f"_{name}") for name in TENSOR_FIELDS}
        packed = Packed(**fields, spec=spec, in_features=in_features)  # type: ignore[arg-type]
        return KbitTensor(
            packed,
            dtype,
            is_transposed=is_transposed,
            activations=activations,
            geometry=geometry,
            factor=inner.get("factor"),
            is_stored_turned=is_stored_turned,
        )

    def _like(self, packed: Packed, dtype: torch.dtype | None = None) -> KbitTensor:
        return KbitTensor(
            packed,
            dtype or self.dtype,
            is_transposed=self.is_transposed,
            activations=self.activations,
            geometry=self.geometry,
            factor=self.factor,
            is_stored_turned=self.is_stored_turned,
        )

    def _turned(self) -> Any:
        if self.geometry is not None or self.factor is not None:
            return NotImplemented
        return KbitTensor(
            self.packed,
            self.dtype,
            is_transposed=not self.is_transposed,
            activations=self.activations,
            is_stored_turned=self.is_stored_turned,
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
        handler = FUNCTIONS.get(func)
        if handler is not None:
            out = handler(*args, **kwargs)
            if out is not NotImplemented:
                return out
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
        kwargs = kwargs or {}
        handler = MOVES.get(func) or READS.get(func)
        out = NotImplemented if handler is None else handler(*args, **kwargs)
        if out is NotImplemented:
            out = func.decompose(*args, **kwargs)  # in inference mode the parts of a function come together
        if out is not NotImplemented:
            return out
        raise refusal(func)


def packed_as(
    packed: Packed, dtype: torch.dtype, shape: tuple[int, ...], *, is_transposed: bool
) -> KbitTensor:
    """A packed matrix as the parameter of ``shape`` that a model has.

    Args:
        packed: ``(*lead, rows, in_features)``.
        dtype: the logical one.
        shape: a view of the matrix, or of its transpose ``(*lead, in_features, rows)``.
        is_transposed: which of the two.
    """
    plain = Geometry.of_matrix(packed.shape, is_transposed=is_transposed)
    moved = plain if tuple(shape) == plain.size else plain.reshaped(shape)
    if moved is None:
        raise ValueError(f"a packed {plain.size} cannot be seen as {tuple(shape)}")
    geometry = None if moved is plain else moved
    return KbitTensor(packed, dtype, is_transposed=is_transposed, geometry=geometry)


def restored(
    tensors: Mapping[str, Tensor],
    spec: str,
    in_features: int,
    dtype: torch.dtype,
    is_transposed: bool,
    activations: str,
    is_parameter: bool,
    geometry: tuple[Any, ...] | None,
    factor: Tensor | None,
) -> Tensor:
    """What ``KbitTensor.__reduce_ex__`` took apart."""
    fields = {name: tensors.get(name) for name in TENSOR_FIELDS}
    packed = Packed(**fields, spec=parse(spec), in_features=in_features)  # type: ignore[arg-type]
    weight = KbitTensor(
        packed,
        dtype,
        is_transposed=is_transposed,
        activations=activations,
        geometry=None if geometry is None else Geometry(*geometry),
        factor=factor,
    )
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def transpose(weight: KbitTensor, dim0: int = 0, dim1: int = 1) -> Any:
    """The weight with its last two dimensions swapped; ``NotImplemented`` for others."""
    dims = {dim0 % weight.dim(), dim1 % weight.dim()}
    if dims != {weight.dim() - 2, weight.dim() - 1}:
        return NotImplemented
    return weight._turned()


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
    if weight.factor is None:
        return weight._like(moved, dtype)
    factor = weight.factor.to(device=device, dtype=dtype, non_blocking=non_blocking)
    return weight._like(moved, dtype).viewed(weight.placement(), factor)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> KbitTensor:
    if not isinstance(target, KbitTensor):
        raise NotImplementedError(
            "a packed weight cannot be copied into a dense tensor: .dequantize() it first. "
            f"To resize embeddings, {DENSE}"
        )
    if not isinstance(source, KbitTensor) and _holds(target, source):
        return target
    if not isinstance(source, KbitTensor) or source.spec != target.spec or source.shape != target.shape:
        raise NotImplementedError(
            f"only a packed weight of the same spec and shape can be copied into a packed weight; {CHANGED}"
        )
    if source.placement() != target.placement() or source.factor is not None or target.factor is not None:
        raise NotImplementedError("a view of a packed weight can neither be written nor copied in")
    for name, value in target.packed.tensors().items():
        value.copy_(getattr(source.packed, name), non_blocking)
    return target


def _holds(weight: KbitTensor, values: Tensor) -> bool:
    """Whether these are the values that it has: what DistributedDataParallel sends to every process."""
    is_like = values.is_floating_point() and values.shape == weight.shape
    return is_like and torch.equal(weight.dequantize(values.dtype), values)


def _scaled(weight: Tensor, by: float | Tensor, *, is_divided: bool) -> Any:
    """Every value times a power of two, in place: exact in what is stored. RWKV does so before it infers."""
    if not isinstance(weight, KbitTensor):
        return NotImplemented
    refused = f"{CHANGED}. Only a power of two that no scale is too small for is exact"
    if (isinstance(by, Tensor) and by.numel() != 1) or math.frexp(float(by))[0] != 0.5:
        raise NotImplementedError(refused)
    factor = 1 / float(by) if is_divided else float(by)
    stored = weight.packed.scaled_tensors()
    is_exact = all(torch.equal(t * factor / factor, t) for t in stored)
    if not is_exact or weight.geometry is not None or weight.factor is not None:
        raise NotImplementedError(refused)
    for tensor in stored:
        tensor.mul_(factor)
    return weight


MOVES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: weight._like(weight.packed),
    aten.alias.default: lambda weight: weight._like(weight.packed),
    aten.clone.default: lambda weight, **_: weight._like(weight.packed.map(torch.clone)),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.mul_.Tensor: functools.partial(_scaled, is_divided=False),
    aten.div_.Tensor: functools.partial(_scaled, is_divided=True),
}


torch.serialization.add_safe_globals([KbitTensor, restored])
