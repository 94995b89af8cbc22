"""Block-wise quantization: a weight to codes and scales, and back.

The one thing to know: ``dequantized = codebook[code] * scale (+ zero)``, one scale for each block of
consecutive weights along the *input* dimension (the last one of a row may be short). Codes are
chosen against the scale *as stored*, so rounding a scale never costs more than its own rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc import datatypes, packing
from kbitc.errors import UsageError, did_you_mean
from kbitc.nearest import Encoder
from kbitc.scale_search import SEARCH_ROUNDS, search_ratios, search_scales
from kbitc.spec import SCALE_GROUP, Spec, parse

# Values a tile: 1 MB in float32, so that the handful of temporaries stays in the L2/L3 cache.
# 4096 x 4096 fp16, 2 threads: 2**18 wins over 2**16 (call overhead) and 2**21 (cache misses).
TILE = 2**18
FIT_SAMPLE = 2**21  # values that a fitted codebook looks at, evenly spaced rows

FP16_MAX = torch.finfo(torch.float16).max
FP16_TINY = torch.finfo(torch.float16).tiny


Operands: TypeAlias = tuple[
    Tensor,  # planes
    Tensor,  # scales
    Tensor,  # codebook
    Tensor | None,  # zeros
    Tensor | None,  # scale_codebook
    Tensor | None,  # scale_absmax
    Tensor | None,  # scale_mean
    Tensor | None,  # outlier_values
    Tensor | None,  # outlier_index
    int,  # in_features
    int,  # bits
    int,  # block
]


@dataclass(frozen=True)
class Packed:
    """One packed weight: plain tensors and the numbers needed to read them.

    Shapes are for a weight of ``(*lead, rows, in_features)``; ``lead`` is the expert dimension of a
    3-D weight, or empty.

    Attributes:
        planes: ``(*lead, rows, row_bytes)`` uint8 bit planes (``kbitc.packing``).
        scales: ``(*lead, rows, blocks)`` float16 (bfloat16 where float16 cannot hold them), or uint8
            codes of double-quantized scales.
        codebook: ``(levels,)`` float32, sorted.
        zeros: like float16 ``scales``, added to each block; None without ``+zp``.
        scale_codebook: ``(256,)`` float32 dynamic map, ``+dq`` only.
        scale_absmax: ``(ceil(number of scales / 256),)`` float32 constants, ``+dq`` only.
        scale_mean: ``(1,)`` float32 mean that was subtracted from the scales, ``+dq`` only.
        outlier_values: ``(*lead, rows, outliers)`` float16 columns, ``+out`` only.
        outlier_index: ``(outliers,)`` int32 input features that they belong to, sorted.
        spec: the format.
        in_features: weights a row.
    """

    planes: Tensor
    scales: Tensor
    codebook: Tensor
    zeros: Tensor | None
    scale_codebook: Tensor | None
    scale_absmax: Tensor | None
    scale_mean: Tensor | None
    outlier_values: Tensor | None
    outlier_index: Tensor | None
    spec: Spec
    in_features: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``(*lead, rows, in_features)``."""
        return (*self.planes.shape[:-1], self.in_features)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is present, by field name."""
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    def nbytes(self) -> int:
        """Bytes of this weight alone: all tensors but the codebooks that a data type shares."""
        shared = {"scale_codebook"}
        if not datatypes.FAMILIES[self.spec.family].is_fitted:
            shared.add("codebook")
        return sum(t.nbytes for name, t in self.tensors().items() if name not in shared)

    def operands(self) -> Operands:
        """The arguments that every ``kbit::`` op takes for a weight, in order."""
        return (*_tensors_of(self), self.in_features, self.spec.bits, self.spec.block)  # type: ignore[return-value]

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """A copy with every tensor replaced by ``function`` of it."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return replace(self, **changed)


TENSOR_FIELDS = (
    "planes",
    "scales",
    "codebook",
    "zeros",
    "scale_codebook",
    "scale_absmax",
    "scale_mean",
    "outlier_values",
    "outlier_index",
)
_tensors_of = attrgetter(*TENSOR_FIELDS)

Encode = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, int, int], Tensor]
"""The signature of :func:`encode_rows`."""

Search = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, int, int], tuple[Tensor, Tensor | None]
]
"""The signature of :func:`kbitc.scale_search.search_scales`."""

QUANTIZERS = ("absmax", "weighted")


def absmax(blocks: Tensor, is_signed: bool) -> Tensor:
    """The largest magnitude of each block; with its sign when ``is_signed`` (first of equals)."""
    if not is_signed:
        low, high = torch.aminmax(blocks, dim=-1)
        return torch.maximum(high, -low)
    at = blocks.abs().argmax(dim=-1, keepdim=True)
    return blocks.gather(-1, at).squeeze(-1)


def quantize(
    weight: Tensor,
    spec: Spec | str,
    *,
    quantizer: str = "absmax",
    importance: Tensor | None = None,
    outliers: Tensor | None = None,
    name: str = "weight",
    encode: Encode | None = None,
    search: Search = search_scales,
) -> Packed:
    """Quantize a weight block by block and pack it.

    Args:
        weight: ``(rows, in_features)`` or ``(experts, rows, in_features)``, any float dtype, any
            strides. Blocks run along the last dimension.
        spec: format, for example "nf4:64".
        quantizer: how scales are chosen. "absmax" takes the largest magnitude of each block; "weighted"
            searches from there for the least squared error, weighted by ``importance``.
        importance: ``(in_features,)`` or ``(experts, in_features)``, not negative: what an error in each
            input feature costs, E[x²] as a rule; "weighted" needs it, "absmax" has no use for it.
        outliers: sorted input-feature indices to keep at 16 bits; by default the columns of largest
            standard deviation (the k-bit paper's proxy, taken on the weight itself), as many as
            ``spec`` asks for.
        name: how error messages call the tensor.
        encode: :func:`encode_rows`, or a faster function that gives the same bytes.
        search: :func:`kbitc.scale_search.search_scales`, or a faster one.

    Returns:
        The packed weight. The same input always gives the same bytes; a value midway between two
        levels takes the lower one.

    Raises:
        UsageError: not a 2-D or 3-D float tensor, an empty one, a NaN or infinite value, or an
            unknown quantizer, or an importance that is missing or of another shape.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if spec.is_left_alone:
        raise UsageError(f"{name}: fp16 means left alone; there is nothing to quantize")
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise UsageError(
            f"{name}: expected a non-empty 2-D or 3-D float weight, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if quantizer not in QUANTIZERS:
        raise UsageError(did_you_mean("quantizer", quantizer, QUANTIZERS))
    features = None if quantizer == "absmax" else _checked_importance(importance, weight, name)
    weight = weight.detach()
    index, values = _split_outliers(weight, spec, outliers, name)
    rows = weight.flatten(0, -2) if weight.dim() == 3 else weight
    source = _Rows(rows, spec.block, index)

    is_signed = datatypes.FAMILIES[spec.family].is_signed and not spec.has_zero_point
    codebook = _codebook(source, spec)
    scales, zeros = _scales_and_zeros(source, spec, is_signed, name)
    if features is not None:
        if index is not None:
            features[:, index.long()] = 0.0
        ratios = search_ratios(spec.bits)
        scales, zeros = search(rows, features, scales, zeros, codebook, ratios, spec.block, SEARCH_ROUNDS)
    stored, constants, effective = _store_scales(scales, spec, codebook, is_signed)
    stored_zeros = None if zeros is None else _to_16_bits(zeros)

    planes = (encode or encode_rows)(rows, effective, stored_zeros, codebook, index, spec.bits, spec.block)

    lead = weight.shape[:-1]
    return Packed(
        planes=planes.view(*lead, -1),
        scales=stored.view(*lead, -1),
        codebook=codebook,
        zeros=None if stored_zeros is None else stored_zeros.view(*lead, -1),
        scale_codebook=constants[0] if constants else None,
        scale_absmax=constants[1] if constants else None,
        scale_mean=constants[2] if constants else None,
        outlier_values=values,
        outlier_index=index,
        spec=spec,
        in_features=weight.shape[-1],
    )


def encode_rows(
    rows: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor,
    outlier_index: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """Codes nearest to a weight under scales that are given, packed: the definition.

    Args:
        rows: ``(rows, in_features)``, any float dtype.
        scales: ``(rows, blocks)`` float32, as reading the stored ones gives them.
        zeros: ``(rows, blocks)`` as stored, subtracted first; or None.
        codebook: ``(levels,)`` float32, sorted.
        outlier_index: input features that count as 0; or None.
        bits: 2 to 8.
        block: weights a scale.

    Returns:
        ``(rows, row_bytes)`` uint8 planes.
    """
    source = _Rows(rows, block, outlier_index)
    encode = Encoder(codebook)
    planes = torch.empty(rows.shape[0], packing.row_bytes(rows.shape[1], bits), dtype=torch.uint8)
    for start, blocks in source.tiles():
        stop = start + blocks.shape[0]
        if zeros is not None:
            blocks.sub_(zeros[start:stop].float().unsqueeze(-1))
        codes = encode(_normalize(blocks, scales[start:stop])).flatten(-2)[:, : rows.shape[1]]
        planes[start:stop] = packing.pack(codes, bits)
    return planes


class _Rows:
    """Tiles of a matrix as float32 blocks, outlier columns zeroed, the last block zero-padded."""

    def __init__(self, rows: Tensor, block: int, outlier_index: Tensor | None) -> None:
        self.rows = rows
        self.block = block
        self.columns = None if outlier_index is None else outlier_index.long()
        self.per_tile = max(1, TILE // rows.shape[1])

    def blocks(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a fresh ``(rows, blocks, block)`` float32 tensor."""
        tile = self.rows[start:stop].to(torch.float32, copy=True).contiguous()
        if self.columns is not None:
            tile[:, self.columns] = 0.0
        short = -tile.shape[1] % self.block
        if short:
            tile = torch.nn.functional.pad(tile, (0, short))
        return tile.view(tile.shape[0], -1, self.block)

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """``(first row, blocks)`` of every tile."""
        for start in range(0, self.rows.shape[0], self.per_tile):
            yield start, self.blocks(start, min(start + self.per_tile, self.rows.shape[0]))

    def limits(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each block, the padding of a short last block left out."""
        low, high = torch.aminmax(blocks, dim=-1)
        short = -self.rows.shape[1] % self.block
        if short:
            last = blocks[:, -1, : self.block - short]
            low[:, -1], high[:, -1] = torch.aminmax(last, dim=-1)
        return low, high


def _checked_importance(importance: Tensor | None, weight: Tensor, name: str) -> Tensor:
    """A copy as ``(experts or 1, in_features)`` float32."""
    if importance is None:
        raise UsageError(f'{name}: quantizer "weighted" needs the importance of each input feature')
    shapes = {(weight.shape[-1],), (*weight.shape[:-2], weight.shape[-1])}
    if tuple(importance.shape) not in shapes:
        raise UsageError(
            f"{name}: importance has shape {tuple(importance.shape)}; "
            f"expected {' or '.join(map(str, sorted(shapes)))}"
        )
    if not bool((importance >= 0).all()) or not bool(importance.isfinite().all()):
        raise UsageError(f"{name}: importance holds a negative, NaN or infinite value")
    return importance.detach().to(torch.float32, copy=True).reshape(-1, weight.shape[-1])


def _scales_and_zeros(source: _Rows, spec: Spec, is_signed: bool, name: str) -> tuple[Tensor, Tensor | None]:
    """Float32 scales, and the middles of the blocks under ``+zp``, of every row."""
    scales, zeros = [], []
    for start, blocks in source.tiles():
        if spec.has_zero_point:
            low, high = source.limits(blocks)
            # Halves first: low + high can overflow float32, low / 2 + high / 2 cannot.
            middle = low / 2 + high / 2
            zeros.append(middle)
            # Centred on the zero as it is stored, so that its rounding is not lost.
            centre = _to_16_bits(middle).float() if middle.isfinite().all() else middle
            scales.append(torch.maximum(high - centre, centre - low))
        else:
            scales.append(absmax(blocks, is_signed))
        if not scales[-1].isfinite().all():
            row = start + int((~scales[-1].isfinite()).any(dim=-1).nonzero()[0])
            raise UsageError(
                f"{name}: row {row} holds a NaN or infinite value; a weight must be finite to be "
                "quantized. Repair the checkpoint, or leave this weight alone with spec fp16"
            )
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def _to_16_bits(values: Tensor) -> Tensor:
    """Float16, or bfloat16 (same size, wider range) when float16 would overflow or go sub-normal."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > FP16_MAX or 0.0 < largest < FP16_TINY:
        return values.to(torch.bfloat16)
    return values.to(torch.float16)


def _store_scales(
    scales: Tensor, spec: Spec, codebook: Tensor, is_signed: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None, Tensor]:
    """Scales as stored, the double-quantization constants, and the scales that reading them gives."""
    if not spec.has_double_quant:
        stored = _to_16_bits(scales)
        return stored, None, stored.float()
    # QLoRA subtracts the mean because absmax scales are all positive. Signed ones are centred
    # already; and where a level 0 is missing, a mean would make an all-zero block inexact.
    keeps_zero = bool((codebook == 0).any())
    mean = torch.zeros(1)
    if not is_signed and (keeps_zero or bool((scales != 0).all())):
        mean = scales.double().mean().float().reshape(1)
    flat = (scales - mean).flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALE_GROUP)).view(-1, SCALE_GROUP)
    constants = padded.abs().amax(dim=-1)
    dynamic = dynamic_map()
    normalized = torch.where(constants[:, None] > 0, padded / constants[:, None], 0.0)
    codes = Encoder(dynamic)(normalized).flatten()[: flat.numel()].view(scales.shape)
    return codes, (dynamic, constants, mean), dequantize_scales(codes, dynamic, constants, mean)


# Kept tensors are plain ones even if inference mode is on when they are first asked for.
@functools.cache
@torch.inference_mode(mode=False)
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic codebook that double quantization stores scales with: (256,) float32."""
    return torch.from_numpy(datatypes.codebook("dynamic", datatypes.Request(bits=8))).float()


def dequantize_scales(codes: Tensor, scale_codebook: Tensor, absmax: Tensor, mean: Tensor) -> Tensor:
    """Float32 scales from 8-bit codes: ``scale_codebook[code] * absmax[group] + mean``."""
    values = scale_codebook[codes.flatten().int()]
    groups = absmax.repeat_interleave(SCALE_GROUP)[: values.numel()]
    return torch.addcmul(mean, values, groups).view(codes.shape)


def effective_scales(
    scales: Tensor,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_mean: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """Float32 scales ``(rows, blocks)`` of a 2-D scale tensor, or of the given rows of it."""
    picked = scales if rows is None else scales[rows]
    if scale_codebook is None or scale_absmax is None or scale_mean is None:
        return picked.float()
    if rows is None:
        return dequantize_scales(picked, scale_codebook, scale_absmax, scale_mean)
    position = rows[:, None] * scales.shape[1] + torch.arange(scales.shape[1], device=rows.device)
    return torch.addcmul(scale_mean, scale_codebook[picked.int()], scale_absmax[position // SCALE_GROUP])


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize`, up to the quantization error.

    Returns:
        ``packed.shape`` tensor of ``dtype``; products are taken in float32 and rounded once.
    """
    return dequantize_operands(*packed.operands(), dtype=dtype)


def dequantize_operands(
    planes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    zeros: Tensor | None,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_mean: Tensor | None,
    outlier_values: Tensor | None,
    outlier_index: Tensor | None,
    in_features: int,
    bits: int,
    block: int,
    *,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """The definition of what a packed weight means, on plain tensors.

    Args:
        rows: 1-D int64 rows to read, of a 2-D weight; None reads all of them.
        dtype: of the result; the others are the fields of :class:`Packed`.

    Returns:
        ``(*lead, rows, in_features)``.
    """
    lead = planes.shape[:-1] if rows is None else rows.shape
    planes, scales = planes.flatten(0, -2), scales.flatten(0, -2)
    all_scales = effective_scales(scales, scale_codebook, scale_absmax, scale_mean, rows)
    zeros = None if zeros is None else zeros.flatten(0, -2)
    values = None if outlier_values is None else outlier_values.flatten(0, -2)
    if rows is not None:
        planes = planes[rows]
        zeros = None if zeros is None else zeros[rows]
        values = None if values is None else values[rows]
    out = torch.empty(planes.shape[0], in_features, dtype=dtype, device=planes.device)
    per_tile = max(1, TILE // in_features)
    short = -in_features % block
    for start in range(0, planes.shape[0], per_tile):
        tile = slice(start, start + per_tile)
        codes = packing.unpack(planes[tile], in_features, bits)
        weights = codebook.index_select(0, codes.flatten().int()).view(codes.shape)
        if short:
            weights = torch.nn.functional.pad(weights, (0, short))
        blocks = weights.unflatten(-1, (-1, block)).mul_(all_scales[tile].unsqueeze(-1))
        if zeros is not None:
            blocks += zeros[tile].float().unsqueeze(-1)
        out[tile] = blocks.flatten(-2)[:, :in_features]
    if values is not None and outlier_index is not None:
        out[:, outlier_index.long()] = values.to(dtype)
    return out.view(*lead, in_features)


def inverse_scales(scales: Tensor) -> Tensor:
    """``1 / scales``, float32; a scale of 0, and one below 3e-39 (a block of sub-normals), gives 0."""
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _normalize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks divided by their scale, in place."""
    return blocks.mul_(inverse_scales(scales).unsqueeze(-1))


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
    return outliers.to(torch.int32), _to_16_bits(values.float())


def _codebook(source: _Rows, spec: Spec) -> Tensor:
    """The spec's codebook as ``(levels,)`` float32; fitted to a sample of the rows if it must be."""
    if not datatypes.FAMILIES[spec.family].is_fitted:
        return shared_codebook(spec)
    values = datatypes.codebook(spec.family, replace(_request(spec), blocks=_sample(source, spec)))
    fitted = torch.from_numpy(values).float()
    # Always full size, so that stored bytes follow from the spec: the last level may repeat.
    return torch.cat([fitted, fitted[-1:].expand(2**spec.bits - fitted.numel())])


@functools.cache
@torch.inference_mode(mode=False)
def shared_codebook(spec: Spec) -> Tensor:
    """Codebook of a data type that is not fitted to a tensor: ``(levels,)`` float32."""
    return torch.from_numpy(datatypes.codebook(spec.family, _request(spec))).float()


def _request(spec: Spec) -> datatypes.Request:
    return datatypes.Request(
        bits=spec.bits,
        exponent=spec.exponent,
        block=spec.block,
        is_centered=spec.has_zero_point,
        variant=spec.variant,
    )


def _sample(source: _Rows, spec: Spec) -> datatypes.Blocks:
    """Evenly spaced rows, block-normalised by their absmax, without padding."""
    count, width = source.rows.shape
    step = max(1, count * width // FIT_SAMPLE)
    picked = _Rows(source.rows[::step], spec.block, None)
    picked.columns = source.columns
    blocks = picked.blocks(0, picked.rows.shape[0])
    raw = blocks.flatten(-2)[:, :width].double()
    if spec.has_zero_point:
        low, high = picked.limits(blocks)
        blocks = blocks - (low / 2 + high / 2).unsqueeze(-1)
        scales = high / 2 - low / 2
    else:
        scales = absmax(blocks, False)
    weight = scales.double().square().unsqueeze(-1).expand(blocks.shape)
    normalized = _normalize(blocks, scales).clamp_(-1.0, 1.0)
    return datatypes.Blocks(
        values=raw.flatten().numpy(),
        normalized=normalized.flatten(-2)[:, :width].double().flatten().nan_to_num(0.0).numpy(),
        weight=weight.flatten(-2)[:, :width].flatten().nan_to_num(0.0, 0.0, 0.0).numpy(),
    )
