"""The ``kbit::`` ops on Triton: choose a kernel and its tiles, launch it, put outlier columns right.

The one thing to know: nothing here reads a value back from the device, so CUDA graphs can record it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kbitc.blockwise import Operands
from kbitc.kernels.gpu.dequantize import dequantize_kernel
from kbitc.kernels.gpu.gemm import gemm_kernel
from kbitc.kernels.gpu.gemv import gemv_kernel

FEW = 16  # rows of x up to which the weight is read by the GEMV
GEMV_ROWS = 16
WARP = 64 if torch.version.hip else 32
PROGRAMS = 512  # split K until there are about as many: a few for each multiprocessor


def _weight(operands: Operands) -> tuple[list[Any], list[int], dict[str, Any]]:
    """Pointers, sizes and compile-time numbers that every kernel takes; absent tensors as dummies."""
    planes, scales, codebook, zeros, scale_codebook, absmax, mean, _, _, features, bits, block = operands
    pointers = [
        planes.contiguous(),
        scales.contiguous(),
        codebook,
        *(codebook if part is None else part.contiguous() for part in (zeros, scale_codebook, absmax, mean)),
    ]
    flags = {"BITS": bits, "BLOCK": block, "HAS_ZEROS": zeros is not None, "HAS_DQ": absmax is not None}
    return pointers, [planes.shape[-1], features, scales.shape[-1]], flags


def _rows(operands: Operands, ids: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    pointers, sizes, flags = _weight(operands)
    out = torch.empty(count, sizes[1], dtype=dtype, device=operands[0].device)
    columns = min(1024, triton.next_power_of_2(sizes[1]))
    if out.numel():
        dequantize_kernel[count, triton.cdiv(sizes[1], columns)](
            out if ids is None else ids, out, *pointers, *sizes, **flags,
            HAS_IDS=ids is not None, COLUMNS=columns,
        )  # fmt: skip
    values, index = operands[7], operands[8]
    if values is not None and index is not None:
        kept = values.flatten(0, -2)
        out[:, index.long()] = (kept if ids is None else kept[ids]).to(dtype)
    return out


def dequantize(*given: Any) -> Tensor:
    """``kbit::dequantize``."""
    lead = given[0].shape[:-1]
    return _rows(given[:12], None, lead.numel(), given[12]).view(*lead, given[9])


def embedding(ids: Tensor, *rest: Any) -> Tensor:
    """``kbit::embedding``; ids must be inside the vocabulary: checking would stop the device."""
    flat = ids.flatten().long()
    return _rows(rest[:12], flat, flat.numel(), rest[12]).view(*ids.shape, rest[9])


def _gemm(x: Tensor, operands: Operands, is_grad: bool) -> Tensor:
    pointers, sizes, flags = _weight(operands)
    m, count = x.shape[0], operands[0].shape[0]
    outer = sizes[1] if is_grad else count
    out = x.new_empty(m, outer)
    tile_m, tile_n = (32 if m <= 32 else 64), 64
    gemm_kernel[triton.cdiv(m, tile_m), triton.cdiv(outer, tile_n)](
        x, out, *pointers, *sizes, count, m, **flags,
        IS_GRAD=is_grad, TILE_M=tile_m, TILE_N=tile_n, TILE_K=32,
    )  # fmt: skip
    return out


def gemv_warps(bits: int, warp: int) -> int:
    """As many as leave 16 bytes of the widest plane to a thread: 64 threads for 2 bits, else 128.

    The plane of one bit beside it is read 4 or 8 bytes at a time: 16 would take 128 registers of values.
    """
    return (64 if bits < 4 else 128) // warp


def _gemv(x: Tensor, operands: Operands) -> Tensor:
    pointers, sizes, flags = _weight(operands)
    m, count = x.shape[0], operands[0].shape[0]
    slots = triton.next_power_of_2(m)
    x = torch.nn.functional.pad(x, (0, 0, 0, slots - m)) if slots > m else x
    tiles = triton.cdiv(count, GEMV_ROWS)
    splits = max(1, min(PROGRAMS // tiles, sizes[1] // 256))
    parts = torch.empty(splits, slots, count, dtype=torch.float32, device=x.device)
    gemv_kernel[tiles, splits](
        x, parts, *pointers, *sizes, count, splits, M=slots, **flags, ROWS=GEMV_ROWS,
        num_warps=gemv_warps(operands[10], WARP),
    )  # fmt: skip
    return parts.sum(0)[:m].to(x.dtype)


def linear(x: Tensor, *rest: Any) -> Tensor:
    """``kbit::linear``."""
    operands, bias = rest[:12], rest[12] if len(rest) > 12 else None
    if x.shape[-1] != operands[9]:
        raise RuntimeError(f"kbit::linear: expected {operands[9]} input features, got {tuple(x.shape)}")
    flat = x.reshape(-1, operands[9]).contiguous()
    values, index = operands[7], operands[8]
    rest_of_x = flat if index is None else flat.index_fill(1, index.long(), 0)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], operands[0].shape[0])
    out = _gemv(rest_of_x, operands) if flat.shape[0] <= FEW else _gemm(rest_of_x, operands, False)
    if values is not None and index is not None:
        out = out + flat[:, index.long()] @ values.to(x.dtype).T
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.view(*x.shape[:-1], -1)


def input_grad(grad: Tensor, *operands: Any) -> Tensor:
    """``kbit::input_grad``."""
    flat = grad.reshape(-1, operands[0].shape[0]).contiguous()
    if flat.shape[0] == 0:
        return grad.new_empty(*grad.shape[:-1], operands[9])
    out = _gemm(flat, operands, True)  # type: ignore[arg-type]
    values, index = operands[7], operands[8]
    if values is not None:
        out[:, index.long()] = flat @ values.to(grad.dtype)
    return out.view(*grad.shape[:-1], operands[9])


KERNELS = {"linear": linear, "input_grad": input_grad, "embedding": embedding, "dequantize": dequantize}
