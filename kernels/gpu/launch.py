"""The ``kbit::`` ops on Triton: choose a kernel and its tiles, launch it.

The one thing to know: nothing here reads a value back from the device, so CUDA graphs can record it, and all
of it can be traced, so that Inductor sees the kernels and fuses what is around them. For one row of x the
GEMV reads the weight; up to ``MANY`` rows tensor cores do, cutting W out of its words; beyond, slabs of W of
at most ``SLAB`` numbers are written in 16 bits and multiplied by the vendor's library, whose speed no kernel
reaches that decodes W again for every tile of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from kbitc.formats import bit_planes
from kbitc.formats.bit_planes import CHUNK
from kbitc.formats.blocks import inverse_scales
from kbitc.formats.encoder import Encoder
from kbitc.formats.packed import Operands
from kbitc.kernels import reference
from kbitc.kernels.gpu.dequantize import columns_kernel, rows_kernel
from kbitc.kernels.gpu.encode import encode_kernel
from kbitc.kernels.gpu.gemv import gemv_kernel
from kbitc.kernels.gpu.int8 import int8_kernel
from kbitc.kernels.gpu.matmul import matmul_kernel
from kbitc.kernels.gpu.tiles import TABLE

# Neither has been measured on a GPU; `benchmarks.gpu_linear` is there for that.
# Rows of x up to which tensor cores cut W out of its words. Every 16 of them (TABLE's tile) read and decode
# W again, at 4 bits a quarter of its 16-bit bytes: 64 rows read as many bytes of W as if it were dense.
MANY = 64
# Numbers of W dense at a time: 64 MiB in 16 bits, a bound on memory beside the packed weights. A weight of
# 4096 x 8192 is one slab, which the vendor's library multiplies in one call.
SLAB = 2**25
PROGRAMS = 1024  # to aim at when K is split
INT8_TILE = {"TILE_M": 32, "TILE_N": 64, "TILE_K": 64}
KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


Launch = Callable[..., None]
Grid = Callable[[dict[str, int]], tuple[int, ...]] | tuple[int, ...]


def _launch(kernel: Any, grid: Grid, like: Tensor) -> Launch:
    """``kernel[grid]``; where ``like`` is being traced, a node of the graph."""
    seen = torch.library.wrap_triton(kernel) if isinstance(like, FunctionalTensor) else kernel
    launch: Launch = seen[grid]
    return launch


def scales_a_chunk(block: int) -> int:
    """Scales that a lane of a chunk meets: each holds for 8 / that many groups of 32 columns.

    0 if the four columns of a lane may have several: no kernel that works on words takes that.
    """
    if block % CHUNK == 0:
        return 1
    if block >= 32 and CHUNK % block == 0:
        return CHUNK // block
    return 8 if block % 4 == 0 else 0


@dataclass(frozen=True)
class Weight:
    """A packed weight as kernels take it.

    Attributes:
        planes: contiguous.
        words: the planes as int32, where they can be read so.
        values: scales, codebook, zeros, scale codebook, absmax and mean; those that are not there as the
            codebook, which no kernel reads in their place.
        sizes: bytes a row, columns, scales a row.
        flags: compile-time arguments.
    """

    operands: Operands
    planes: Tensor
    words: Tensor
    values: list[Tensor]
    sizes: list[int]
    flags: dict[str, Any]

    @property
    def pointers(self) -> list[Tensor]:
        """The weight as all kernels but one take it."""
        return [self.planes, self.words, *self.values]

    @property
    def rows(self) -> int:
        """Of all experts together."""
        return self.operands.planes.shape[:-1].numel()

    @property
    def features(self) -> int:
        """Columns."""
        return self.operands.in_features

    @property
    def outliers(self) -> tuple[list[Tensor], int]:
        """Values, columns, and how many there are."""
        values, index = self.operands.outlier_values, self.operands.outlier_index
        if values is None or index is None:
            return [self.operands.codebook, self.operands.codebook], 0
        return [values.contiguous(), index], index.numel()


def read_weight(operands: Operands) -> Weight:
    """Pointers, sizes and compile-time numbers of a weight."""
    planes, codebook = operands.planes.contiguous(), operands.codebook
    # What is traced has no address yet; memory itself begins at a multiple of 16.
    begin = planes.storage_offset() if isinstance(planes, FunctionalTensor) else planes.data_ptr()
    is_aligned = planes.shape[-1] % 4 == 0 and begin % 4 == 0
    words = planes.view(torch.int32) if is_aligned else planes
    optional = (operands.zeros, operands.scale_codebook, operands.scale_absmax, operands.scale_mean)
    values = [codebook if value is None else value.contiguous() for value in optional]
    flags = {
        "BITS": operands.bits,
        "BLOCK": operands.block,
        "HAS_ZEROS": operands.zeros is not None,
        "HAS_DQ": operands.scale_absmax is not None,
        "SCALES": scales_a_chunk(operands.block),
        "IS_ALIGNED": is_aligned,
    }
    values = [operands.scales.contiguous(), codebook, *values]
    sizes = [planes.shape[-1], operands.in_features, operands.scales.shape[-1]]
    return Weight(operands, planes, words, values, sizes, flags)


def _as_words(x: Tensor) -> Tensor:
    """Rows of 16-bit floats as int64, padded to whole ones; float32 as it is."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 4)) if x.shape[1] % 4 else x
    return x if x.dtype == torch.float32 else x.view(torch.int64)


# Rows of the weight -----------------------------------------------------------------------------


def _rows(weight: Weight, ids: Tensor | None, begin: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows ``ids``, or ``count`` rows from ``begin`` on, ``(count, features)``."""
    features, flags = weight.features, weight.flags
    out = torch.empty(count, features, dtype=dtype, device=weight.planes.device)
    if out.numel() == 0:
        return out
    given = weight.operands.codebook if ids is None else ids
    is_whole = flags["SCALES"] > 0 and (dtype == torch.float32 or features % 4 == 0)
    first = features // CHUNK * CHUNK if is_whole else 0
    if first:
        _launch(rows_kernel, _grid_of(count, features), out)(
            given, out if dtype == torch.float32 else out.view(torch.int64),
            *weight.pointers, *weight.sizes, begin, count, **flags,
            KIND=KINDS[dtype], HAS_IDS=ids is not None,
        )  # fmt: skip
    if first < features:
        columns = min(512, triton.next_power_of_2(features - first))
        _launch(columns_kernel, (count, triton.cdiv(features - first, columns)), out)(
            given, out, weight.planes, *weight.values, *weight.sizes, begin, first,
            **{name: flags[name] for name in ("BITS", "BLOCK", "HAS_ZEROS", "HAS_DQ")},
            HAS_IDS=ids is not None, COLUMNS=columns,
        )  # fmt: skip
    values, index = weight.operands.outlier_values, weight.operands.outlier_index
    if values is not None and index is not None:
        kept = values.flatten(0, -2)
        picked = kept.narrow(0, begin, count) if ids is None else kept.index_select(0, ids)
        out.index_copy_(1, index.long(), picked.to(dtype))
    return out


def _grid_of(count: int, features: int) -> Grid:
    """Programs for whole chunks of so many rows."""
    return lambda meta: (
        triton.cdiv(count, meta["ROWS"]),
        triton.cdiv(features // CHUNK, meta["CHUNKS"]),
    )


def _slabs(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The weight in 16 bits, a slab of rows at a time, and the first of these."""
    step = max(1, SLAB // weight.features)
    for begin in range(0, weight.rows, step):
        count = min(step, weight.rows - begin)
        yield begin, _rows(weight, None, begin, count, dtype)


def dequantize(*given: Any) -> Tensor:
    """``kbit::dequantize``."""
    operands, dtype = Operands.split(given)
    weight = read_weight(operands)
    lead = operands.planes.shape[:-1]
    return _rows(weight, None, 0, weight.rows, dtype).view(*lead, weight.features)


def embedding(ids: Tensor, *rest: Any) -> Tensor:
    """``kbit::embedding``; ids must be inside the vocabulary: checking would stop the device."""
    operands, dtype = Operands.split(rest)
    weight = read_weight(operands)
    flat = ids.flatten().long()
    return _rows(weight, flat, 0, flat.numel(), dtype).view(*ids.shape, weight.features)


# Products ---------------------------------------------------------------------------------------


def _splits(kernel: str, slots: int, rows: int, features: int) -> int:
    """Parts of K, for about ``PROGRAMS`` programs of the shipped tiles (whatever was measured)."""
    tiles = TABLE[kernel][0]
    programs = slots * -(-rows // tiles.rows)
    return max(1, min(PROGRAMS // programs, features // (CHUNK * tiles.chunks)))


def _gemv(x: Tensor, weight: Weight) -> Tensor:
    """``x @ W.T`` in float32 for one row of x."""
    count = weight.rows
    splits = _splits("gemv", 1, count, weight.features)
    parts = torch.empty(splits, count, dtype=torch.float32, device=x.device)
    outliers, kept = weight.outliers
    _launch(gemv_kernel, lambda meta: (triton.cdiv(count, meta["ROWS"]), splits), parts)(
        _as_words(x), parts, *weight.pointers, *outliers, *weight.sizes, kept, count, splits,
        **weight.flags, HAS_OUTLIERS=kept > 0, KIND=KINDS[x.dtype],
    )  # fmt: skip
    return parts.sum(0, keepdim=True)


def _fits_tensor_cores(x: Tensor, weight: Weight) -> bool:
    """Whether `matmul_kernel` takes them: float32 is left to the vendor's library."""
    return x.dtype != torch.float32 and weight.flags["SCALES"] > 0


def _matmul(x: Tensor, weight: Weight, offsets: Tensor | None = None) -> Tensor:
    """``x @ W.T`` in float32 on tensor cores; with offsets, each row of x with the weight of its expert."""
    m = x.shape[0]
    experts = 1 if offsets is None else offsets.numel()
    count = weight.rows // experts
    words = _as_words(x)

    def slots(tile: int) -> int:
        return -(-m // tile) + (experts if offsets is not None else 0)

    most = slots(TABLE["matmul"][0].m)
    splits = 1 if offsets is not None else _splits("matmul", most, count, weight.features)
    parts = torch.empty(splits, m, count, dtype=torch.float32, device=x.device)
    outliers, kept = weight.outliers

    def grid(meta: dict[str, int]) -> tuple[int, ...]:
        return slots(meta["TILE_M"]), triton.cdiv(count, meta["ROWS"]), splits

    _launch(matmul_kernel, grid, parts)(
        words, parts, *weight.pointers, *outliers, weight.operands.codebook if offsets is None else offsets,
        *weight.sizes, kept, count, splits, words.shape[1] * 4, m,
        experts, **weight.flags, HAS_OUTLIERS=kept > 0, KIND=KINDS[x.dtype], IS_GROUPED=offsets is not None,
    )  # fmt: skip
    return parts.squeeze(0) if splits == 1 else parts.sum(0)


def linear(x: Tensor, *rest: Any) -> Tensor:
    """``kbit::linear``."""
    operands, bias = Operands.split(rest)
    _check_input("linear", x, operands.in_features)
    weight = read_weight(operands)
    flat = x.reshape(-1, weight.features).contiguous()
    m = flat.shape[0]
    if m == 0 or weight.rows == 0:
        return x.new_empty(*x.shape[:-1], weight.rows)
    if m == 1:
        out = _gemv(flat, weight)
    elif m <= MANY and _fits_tensor_cores(x, weight):
        out = _matmul(flat, weight)
    else:
        out = torch.cat([flat @ dense.T for _, dense in _slabs(weight, x.dtype)], dim=1)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def input_grad(grad: Tensor, *operands: Any) -> Tensor:
    """``kbit::input_grad``."""
    weight = read_weight(Operands(*operands))
    _check_input("input_grad", grad, weight.rows)
    flat = grad.reshape(-1, weight.rows)
    out = torch.zeros(flat.shape[0], weight.features, dtype=torch.float32, device=grad.device)
    for begin, dense in _slabs(weight, grad.dtype):
        out += flat.narrow(1, begin, dense.shape[0]) @ dense
    return out.to(grad.dtype).view(*grad.shape[:-1], weight.features)


def grouped_linear(x: Tensor, *rest: Any) -> Tensor:
    """``kbit::grouped_linear``."""
    operands, offsets = Operands.split(rest)
    weight, count = read_weight(operands), operands.planes.shape[1]
    _check_input("grouped_linear", x, weight.features)
    if x.shape[0] == 0:
        return x.new_empty(0, count)
    if _fits_tensor_cores(x, weight):
        return _matmul(x.contiguous(), weight, offsets).to(x.dtype)
    out = torch.zeros(x.shape[0], count, dtype=torch.float32, device=x.device)
    for is_here, dense in _experts(x, weight, count, offsets):
        out += torch.where(is_here, x, 0) @ dense.T
    return out.to(x.dtype)


def grouped_input_grad(grad: Tensor, *rest: Any) -> Tensor:
    """``kbit::grouped_input_grad``."""
    operands, offsets = Operands.split(rest)
    weight, count = read_weight(operands), operands.planes.shape[1]
    _check_input("grouped_input_grad", grad, count)
    out = torch.zeros(grad.shape[0], weight.features, dtype=torch.float32, device=grad.device)
    for is_here, dense in _experts(grad, weight, count, offsets):
        out += torch.where(is_here, grad, 0) @ dense
    return out.to(grad.dtype)


def _experts(x: Tensor, weight: Weight, count: int, offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Which rows of x meet each expert, and its weight dense: how many rows, only the device knows."""
    tokens = torch.arange(x.shape[0], device=x.device)
    expert = torch.bucketize(tokens, offsets, right=True)
    for e in range(offsets.numel()):
        yield (expert == e).unsqueeze(-1), _rows(weight, None, e * count, count, x.dtype)


def linear_int8(x: Tensor, *rest: Any) -> Tensor:
    """``kbit::linear_int8``; what the weight must be, `reference.linear_int8` says."""
    operands, bias = Operands.split(rest)
    weight, planes, codebook = read_weight(operands), operands.planes, operands.codebook
    _check_input("linear_int8", x, weight.features)
    has_one_scale = operands.scales.shape[-1] == 1 and operands.zeros is None
    if operands.bits != reference.INT8_BITS or not has_one_scale:
        raise RuntimeError(reference.INT8_NEEDS)
    flat = x.reshape(-1, weight.features).float()
    index, values = operands.outlier_index, operands.outlier_values
    inside = flat if index is None else flat.index_fill(1, index.long(), 0.0)
    absmax = inside.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(absmax, reference.INT8_MOST) / absmax
    is_usable = inverse.isfinite()
    rounded = torch.where(is_usable, inside * inverse, 0.0).round().to(torch.int8)
    sums = torch.empty(flat.shape[0], weight.rows, dtype=torch.int32, device=x.device)
    if sums.numel():
        tile = INT8_TILE
        grid = (triton.cdiv(sums.shape[0], tile["TILE_M"]), triton.cdiv(weight.rows, tile["TILE_N"]))
        _launch(int8_kernel, grid, sums)(
            rounded, sums, planes, planes.shape[-1], weight.features, weight.rows, sums.shape[0], **tile
        )
    steps = reference.plain_scales(operands).scales.float().mT * (
        codebook.narrow(0, codebook.numel() - 1, 1) / reference.INT8_MOST
    )
    # A row with a NaN or an infinity: its scale is not finite, nor may its result be.
    scale = torch.where(is_usable | (absmax == 0), absmax, absmax * torch.nan)
    out = sums.float() * (scale / reference.INT8_MOST * steps)
    if index is not None and values is not None:
        out = out + flat.index_select(1, index.long()) @ values.float().mT
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).view(*x.shape[:-1], weight.rows)


# Codes ------------------------------------------------------------------------------------------


def encode(
    rows: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor,
    outlier_index: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """``kbit::encode``."""
    count, features = rows.shape
    values = (rows if outlier_index is None else rows.index_fill(1, outlier_index.long(), 0)).contiguous()
    inverse = inverse_scales(scales.float())
    encoder = Encoder(codebook)
    width = bit_planes.row_bytes(features, bits)
    out = torch.empty(count, width, dtype=torch.uint8, device=rows.device)
    first = features // CHUNK * CHUNK if width % 4 == 0 else 0
    if first and count:
        bounds = torch.full((2**bits - 1,), torch.inf, device=rows.device)
        bounds[: encoder.bounds.numel()] = encoder.bounds
        _launch(encode_kernel, _grid_of(count, first), out)(
            values, inverse, inverse if zeros is None else zeros.contiguous(), bounds, out.view(torch.int32),
            width // 4, features, scales.shape[1], count,
            BITS=bits, BLOCK=block, HAS_ZEROS=zeros is not None,
        )  # fmt: skip
    if first < features:
        at = torch.arange(first, features, device=rows.device) // block
        rest = values[:, first:].float()
        rest = rest if zeros is None else rest - zeros.float()[:, at]
        codes = torch.bucketize(rest * inverse[:, at], encoder.bounds, out_int32=True)
        out[:, first * bits // 8 :] = bit_planes.pack(codes.to(torch.uint8), bits)
    return out


def _check_input(name: str, x: Tensor, features: int) -> None:
    if x.dtype not in KINDS or x.shape[-1] != features:
        raise RuntimeError(
            f"kbit::{name}: expected float32, float16 or bfloat16 with {features} features, got {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )


KERNELS = {
    "linear": linear,
    "input_grad": input_grad,
    "embedding": embedding,
    "dequantize": dequantize,
    "grouped_linear": grouped_linear,
    "grouped_input_grad": grouped_input_grad,
    "linear_int8": linear_int8,
    "encode": encode,
}
