"""A dense weight to a `Packed` one, in two steps, so that a quantizer can choose scales between them.

The one thing to know: `draft` splits off the outlier features and takes the codebook and absmax scales that
the spec fixes; :meth:`Draft.packed` stores the scales and chooses the nearest codes. What lies between is a
quantizer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.blocks import RowTiles
from kbitc.formats.codebooks import codebook_for
from kbitc.formats.packed import Packed
from kbitc.formats.scale_search import SEARCH_ROUNDS, search_ratios
from kbitc.formats.scales import absmax_scales, store_scales, store_zeros, to_16_bits
from kbitc.formats.spec import Spec, parse
from kbitc.kernels import ops as _ops  # noqa: F401  # registers torch.ops.kbit


@dataclass(frozen=True)
class Draft:
    """A weight on its way to codes.

    Attributes:
        rows: ``(rows, in_features)``, experts one after another.
        lead: ``(*lead, rows)`` of the weight.
        spec: the format.
        codebook: ``(levels,)`` float32, sorted.
        scales: ``(rows, blocks)`` float32, as chosen so far.
        zeros: the same under ``+zp``; None without.
        outlier_index: ``(outliers,)`` int32 input features that stay outside the codes; None for none.
        outlier_values: ``(*lead, rows, outliers)`` their weights at 16 bits.
    """

    rows: Tensor
    lead: torch.Size
    spec: Spec
    codebook: Tensor
    scales: Tensor
    zeros: Tensor | None
    outlier_index: Tensor | None
    outlier_values: Tensor | None

    def searched(self, importance: Tensor) -> Draft:
        """With scales (and zeros) that lose least by squared error, weighted by ``importance``.

        Args:
            importance: ``(groups, in_features)`` not negative; group g weighs its ``rows / groups`` rows.
        """
        importance = importance.to(torch.float32, copy=True)
        if self.outlier_index is not None:
            importance[:, self.outlier_index.long()] = 0.0
        ratios, block = search_ratios(self.spec.bits), self.spec.block
        scales, zeros = torch.ops.kbit.search_scales(
            self.rows, importance, self.scales, self.zeros, self.codebook, ratios, block, SEARCH_ROUNDS
        )
        return replace(self, scales=scales, zeros=None if self.zeros is None else zeros)

    def packed(self) -> Packed:
        """The nearest codes under the scales *as stored*, packed.

        The same input always gives the same bytes; a value midway between two levels takes the lower one.
        """
        spec, index = self.spec, self.outlier_index
        stored, constants, effective = store_scales(self.scales, spec, self.codebook)
        zeros = None if self.zeros is None else store_zeros(self.zeros, effective, spec)
        planes = torch.ops.kbit.encode(
            self.rows, effective, zeros, self.codebook, index, spec.bits, spec.block
        )
        return Packed(
            planes=planes.view(*self.lead, -1),
            scales=stored.view(*self.lead, -1),
            codebook=self.codebook,
            zeros=None if zeros is None else zeros.view(*self.lead, -1),
            scale_codebook=constants[0] if constants else None,
            scale_absmax=constants[1] if constants else None,
            scale_mean=constants[2] if constants else None,
            outlier_values=self.outlier_values,
            outlier_index=index,
            spec=spec,
            in_features=self.rows.shape[1],
        )


def draft(weight: Tensor, spec: Spec | str, *, outliers: Tensor | None = None, name: str = "weight") -> Draft:
    """A weight with the scales of its blocks' largest magnitudes.

    Args:
        weight: ``(rows, in_features)`` or ``(experts, rows, in_features)``, any float dtype, any
            strides. Blocks run along the last dimension.
        spec: format, for example "nf4:64".
        outliers: sorted input-feature indices to keep at 16 bits; by default the columns of largest
            standard deviation (the k-bit paper's proxy, taken on the weight itself), as many as
            ``spec`` asks for.
        name: how error messages call the tensor.

    Raises:
        UsageError: not a 2-D or 3-D float tensor, an empty one, or a NaN or infinite value.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if spec.is_left_alone:
        raise UsageError(f"{name}: fp16 means left alone; there is nothing to quantize")
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise UsageError(
            f"{name}: expected a non-empty 2-D or 3-D float weight, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if spec.has_int8_inputs and weight.dim() == 3:
        raise UsageError(f"{name}: experts have no int8 matmul; leave +a8 away for them")
    if spec.has_int8_inputs and spec.block < weight.shape[-1]:
        raise UsageError(
            f"{name}: {spec} has several scales for its rows of {weight.shape[-1]}; +a8 takes one, in a "
            f"block of at least so many: int8:{weight.shape[-1]}+a8"
        )
    weight = weight.detach()
    index, values = _split_outliers(weight, spec, outliers, name)
    rows = weight.flatten(0, -2) if weight.dim() == 3 else weight
    source = RowTiles(rows, spec.block, index)
    codebook = codebook_for(source, spec)
    scales, zeros = absmax_scales(source, spec, name)
    return Draft(rows, weight.shape[:-1], spec, codebook, scales, zeros, index, values)


def checked_importance(importance: Tensor, weight: Tensor, name: str) -> Tensor:
    """``importance`` as ``(experts or 1, in_features)``.

    Args:
        importance: ``(in_features,)`` or ``(experts, in_features)``, not negative: what an error in each
            input feature costs, E[x²] as a rule.
        weight: that it is of.
        name: how error messages call the weight.

    Raises:
        UsageError: of another shape, or a negative, NaN or infinite value.
    """
    shapes = {(weight.shape[-1],), (*weight.shape[:-2], weight.shape[-1])}
    if tuple(importance.shape) not in shapes:
        raise UsageError(
            f"{name}: importance has shape {tuple(importance.shape)}; "
            f"expected {' or '.join(map(str, sorted(shapes)))}"
        )
    if not bool((importance >= 0).all()) or not bool(importance.isfinite().all()):
        raise UsageError(f"{name}: importance holds a negative, NaN or infinite value")
    return importance.detach().reshape(-1, weight.shape[-1])


def _split_outliers(
    weight: Tensor, spec: Spec, outliers: Tensor | None, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Indices and 16-bit values of the input features that stay outside the codes."""
    if spec.outlier_count(weight.shape[-1]) == 0:
        if outliers is not None:
            raise UsageError(f"{name}: outlier features were given, but {spec} has no +out")
        return None, None
    if outliers is None:
        deviation = weight.float().flatten(0, -2).std(dim=0, correction=0)
        order = torch.sort(deviation, descending=True, stable=True).indices
        outliers = order[: spec.outlier_count(weight.shape[-1])].sort().values
    values = weight[..., outliers.long()]
    if not values.isfinite().all():
        raise UsageError(f"{name}: an outlier column holds a NaN or infinite value")
    return outliers.to(torch.int32), to_16_bits(values.float())
