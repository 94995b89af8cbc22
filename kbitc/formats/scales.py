"""Scales and zero points: of the blocks' extremes, as they are stored, and as reading them gives them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.blocks import RowTiles, absmax
from kbitc.formats.codebooks import dynamic_map
from kbitc.formats.encoder import Encoder
from kbitc.formats.scale_grid import scales_on_grid, steps_on_grid, whole_steps, zeros_on_grid
from kbitc.formats.spec import SCALE_GROUP, Spec

FP16_MAX = torch.finfo(torch.float16).max
FP16_TINY = torch.finfo(torch.float16).tiny
MOST_OF_A_SCALE = 0.5  # that double quantization may lose; it loses 0.02 of ordinary ones


def absmax_scales(source: RowTiles, spec: Spec, name: str) -> tuple[Tensor, Tensor | None]:
    """Float32 scales, and the zero points of the blocks under ``+zp``, of every row."""
    scales, zeros = [], []
    for start, blocks in source.tiles():
        if spec.has_zero_point:
            low, high = source.limits(blocks)
            zero = _zero_points(low, high, spec)
            zeros.append(zero)
            # Measured from the zero as it is stored, so that its rounding is not lost.
            is_exact = zero.isfinite().all() and not spec.has_integer_zeros
            origin = store_zeros(zero, zero, spec).float() if is_exact else zero
            scales.append(_reach(low, high, origin, spec))
        else:
            scales.append(absmax(blocks, spec.is_signed))
        if not scales[-1].isfinite().all():
            row = start + int((~scales[-1].isfinite()).any(dim=-1).nonzero()[0])
            raise UsageError(
                f"{name}: row {row} holds a NaN or infinite value; a weight must be finite to be "
                "quantized. Repair the checkpoint, or leave this weight alone with spec fp16"
            )
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def _zero_points(low: Tensor, high: Tensor, spec: Spec) -> Tensor:
    if spec.is_from_minimum:
        return low.clamp_max(0.0) if spec.scale_bits or spec.has_integer_zeros else low
    # Halves first: low + high can overflow float32, low / 2 + high / 2 cannot.
    return low / 2 + high / 2


def _reach(low: Tensor, high: Tensor, origin: Tensor, spec: Spec) -> Tensor:
    """Scales under which the levels reach a block's extremes from its zero point."""
    if not spec.is_from_minimum:
        return torch.maximum(high - origin, origin - low)
    levels: int = 2**spec.bits
    high = high.clamp_min(0.0) if spec.has_integer_zeros else high  # 0 is a level
    return (high - origin).clamp_min(0.0) * (levels / (levels - 1))


def to_16_bits(values: Tensor) -> Tensor:
    """Float16, or bfloat16 (same size, wider range) when float16 would overflow or go sub-normal."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > FP16_MAX or 0.0 < largest < FP16_TINY:
        return values.to(torch.bfloat16)
    return values.to(torch.float16)


def store_scales(
    scales: Tensor, spec: Spec, codebook: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None, Tensor]:
    """Scales as stored, the double-quantization constants, and the scales that reading them gives."""
    if not spec.has_double_quant:
        stored = _as_stored(scales, spec)
        return stored, None, stored.float()
    # QLoRA subtracts the mean because absmax scales are all positive. Signed ones are centred
    # already; and where a level 0 is missing, a mean would make an all-zero block inexact.
    keeps_zero = bool((codebook == 0).any())
    mean = torch.zeros(1)
    if not spec.is_signed and (keeps_zero or bool((scales != 0).all())):
        mean = scales.double().mean().float().reshape(1)
    centred = _with_mean(scales, mean)
    if bool(mean != 0):
        lost = _worst_error(centred[2], scales)
        if lost > MOST_OF_A_SCALE:  # scales far below the mean: the codes of zero are finer than those of it
            as_they_are = _with_mean(scales, torch.zeros(1))
            return as_they_are if _worst_error(as_they_are[2], scales) < lost else centred
    return centred


def _as_stored(scales: Tensor, spec: Spec) -> Tensor:
    """At 16 bits each."""
    if spec.scale_bits:
        return scales_on_grid(scales, spec).half()
    return steps_on_grid(scales, spec).half() if spec.has_integer_zeros else to_16_bits(scales)


def store_zeros(zeros: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """Zero points as stored, under scales as reading them gives."""
    if spec.has_integer_zeros:
        step = scales.double() * 2.0**-spec.bits
        return (-step * whole_steps(zeros, scales, spec)).half()
    return zeros_on_grid(zeros, spec).half() if spec.scale_bits else to_16_bits(zeros)


def _worst_error(read: Tensor, scales: Tensor) -> float:
    """The largest error of a scale, relative to the scale."""
    return float(((read - scales).abs() / scales.abs().clamp_min(FP16_TINY**2)).max())


def _with_mean(scales: Tensor, mean: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """What `store_scales` gives where ``mean`` is subtracted from the scales first."""
    flat = (scales - mean).flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALE_GROUP)).view(-1, SCALE_GROUP)
    constants = padded.abs().amax(dim=-1)
    dynamic = dynamic_map()
    normalized = torch.where(constants[:, None] > 0, padded / constants[:, None], 0.0)
    codes = scale_encoder()(normalized).flatten()[: flat.numel()].view(scales.shape)
    return codes, (dynamic, constants, mean), dequantize_scales(codes, dynamic, constants, mean)


@functools.cache
@torch.inference_mode(mode=False)
def scale_encoder() -> Encoder:
    """Codes of double quantization, made once."""
    return Encoder(dynamic_map())


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
