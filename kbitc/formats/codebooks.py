"""Codebooks as tensors: those that weights share, and those that are fitted to one weight."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kbitc.formats import datatypes
from kbitc.formats.blocks import RowTiles, absmax, normalize
from kbitc.formats.spec import Spec

FIT_SAMPLE = 2**21  # values that a fitted codebook looks at, evenly spaced rows


# Kept tensors are plain ones even if inference mode is on when they are first asked for.
@functools.cache
@torch.inference_mode(mode=False)
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic codebook that double quantization stores scales with: (256,) float32."""
    return torch.from_numpy(datatypes.codebook("dynamic", datatypes.CodebookRequest(bits=8))).float()


def codebook_for(source: RowTiles, spec: Spec) -> Tensor:
    """The spec's codebook as ``(levels,)`` float32; fitted to a sample of the rows if it must be."""
    if not spec.is_fitted:
        return shared_codebook(spec)
    values = datatypes.codebook(spec.family, replace(codebook_request(spec), blocks=_sample(source, spec)))
    fitted = torch.from_numpy(values).float()
    # Always full size, so that stored bytes follow from the spec: the last level may repeat.
    return torch.cat([fitted, fitted[-1:].expand(2**spec.bits - fitted.numel())])


@functools.cache
@torch.inference_mode(mode=False)
def shared_codebook(spec: Spec) -> Tensor:
    """Codebook of a data type that is not fitted to a tensor: ``(levels,)`` float32."""
    return torch.from_numpy(datatypes.codebook(spec.family, codebook_request(spec))).float()


def codebook_request(spec: Spec) -> datatypes.CodebookRequest:
    """What a data type may depend on, of a spec."""
    return datatypes.CodebookRequest(
        bits=spec.bits,
        exponent=spec.exponent,
        block=spec.block,
        is_centered=spec.has_zero_point,
        variant=spec.variant,
    )


def _sample(source: RowTiles, spec: Spec) -> datatypes.Blocks:
    """Evenly spaced rows, block-normalised by their absmax, without padding."""
    count, width = source.rows.shape
    step = max(1, count * width // FIT_SAMPLE)
    picked = RowTiles(source.rows[::step], spec.block, None)
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
    normalized = normalize(blocks, scales).clamp_(-1.0, 1.0)
    return datatypes.Blocks(
        values=raw.flatten().numpy(),
        normalized=normalized.flatten(-2)[:, :width].double().flatten().nan_to_num(0.0).numpy(),
        weight=weight.flatten(-2)[:, :width].flatten().nan_to_num(0.0, 0.0, 0.0).numpy(),
    )
