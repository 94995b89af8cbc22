"""A packed weight as the tensors that stand in a file, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kbitc.formats.layout import SCALE_MAP, SHARED
from kbitc.formats.packed import TENSOR_FIELDS, Packed
from kbitc.formats.spec import Spec
from kbitc.system.large_pages import LargePages
from kbitc.tensor.kbit_tensor import KbitTensor, packed_as


def stored_tensors(packed: Packed) -> dict[str, Tensor]:
    """The tensors of a packed weight that stand in the file under its own name, by field."""
    own = packed.tensors()
    own.pop("scale_codebook", None)
    if not packed.spec.is_fitted:
        own.pop("codebook")
    return own


def assemble(
    parts: Mapping[str, Tensor],
    spec: Spec,
    shape: tuple[int, ...],
    shared: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    is_transposed: bool,
    view_of: tuple[int, ...] | None = None,
    pages: LargePages | None = None,
) -> KbitTensor:
    """Inverse of :func:`stored_tensors`: of the logical ``shape``, a view of ``view_of``, and ``dtype``.

    Its own tensors are copied to ``pages``, if there are any.
    """
    matrix = view_of or shape
    in_features = matrix[-2] if is_transposed else matrix[-1]
    if pages is not None:
        parts = {name: pages.place(part) for name, part in parts.items()}
    packed = packed_of(parts, spec, in_features, shared)
    return packed_as(packed, dtype, shape, is_transposed=is_transposed)


def packed_of(
    parts: Mapping[str, Tensor], spec: Spec, in_features: int, shared: Mapping[str, Tensor]
) -> Packed:
    """Inverse of :func:`stored_tensors`."""
    fields: dict[str, Tensor | None] = {name: parts.get(name) for name in TENSOR_FIELDS}
    if fields["codebook"] is None:
        fields["codebook"] = shared[SHARED + spec.codebook_name]
    if spec.has_double_quant:
        fields["scale_codebook"] = shared[SCALE_MAP]
    return Packed(**fields, spec=spec, in_features=in_features)  # type: ignore[arg-type]
