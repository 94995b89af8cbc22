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
from torch import Tensor

from kbitc.formats.packed import TENSOR_FIELDS, Operands, Packed
from kbitc.formats.spec import Spec
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit

aten = torch.ops.aten

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What a packed weight serves: `kbitc.tensor.functions` fills it, which importing the room sees to."""


class KbitTensor(Tensor):
    """A packed 2-D or 3-D weight.

    Attributes:
        packed: the plain tensors, spec and width; its rows are always *output* features.
        is_transposed: the logical tensor is ``(..., in_features, rows)``: GPT-2's Conv1D.
        activations: "float", or "int8" for a linear in integers (`kbitc.tensor.activations`).
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
        handler = FUNCTIONS.get(func)
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
        handler = MOVES.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} is not defined on a packed weight. kbitc packs weights that are read by "
                "linear, addmm, matmul, embedding or grouped matmul; for anything else call "
                ".dequantize() first, or leave this weight alone (spec fp16) when compiling"
            )
        return handler(*args, **(kwargs or {}))


def transpose(weight: KbitTensor, dim0: int = 0, dim1: int = 1) -> KbitTensor:
    """The weight with its last two dimensions swapped; there are no others to transpose."""
    dims = {dim0 % weight.dim(), dim1 % weight.dim()}
    if dims != {weight.dim() - 2, weight.dim() - 1}:
        raise NotImplementedError(f"transposing dimensions {dim0} and {dim1} of a packed weight")
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
    return weight._like(moved, dtype)


def _copy(target: KbitTensor, source: Tensor, non_blocking: bool = False) -> KbitTensor:
    if not isinstance(source, KbitTensor) or source.spec != target.spec or source.shape != target.shape:
        raise NotImplementedError("only a packed weight of the same spec and shape can be copied in")
    for name, value in target.packed.tensors().items():
        value.copy_(getattr(source.packed, name), non_blocking)
    return target


MOVES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: weight._like(weight.packed),
    aten.alias.default: lambda weight: weight._like(weight.packed),
    aten.clone.default: lambda weight, **_: weight._like(weight.packed.map(torch.clone)),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.t.default: KbitTensor._turned,
    aten.transpose.int: transpose,
}


torch.serialization.add_safe_globals([KbitTensor])
