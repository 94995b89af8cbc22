"""`PackedRows`: keys, or values, of tokens as codes of k bits, as kernels/cpu/bindings_cache.h has them.

Each row, of a token and a head, is packed for itself. Keys are not packed as they are: q . k does not change
when keys lose what all of them share (softmax does not see it), when they are multiplied by a factor a
channel that queries are divided by, nor when both are turned by an orthogonal matrix. So

    y = H ((k - centre) * factor),    factor = (mean q^2 / mean (k - centre)^2)^(1/4)

where H is a Hadamard matrix, which spreads what one channel has over all of them, and the factors make the
error of q . y smallest for an error of y that is alike in all directions. The first `FIRST` tokens say centre
and factors; these tokens stay float16: attention comes back to them again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats import bit_planes
from kbitc.formats.blocks import RowTiles, absmax
from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.packed import Operands
from kbitc.formats.spec import Spec

FIRST = 64  # tokens
LEAST = 1e-4  # of the mean square of a head's channels: what a channel counts at least
MOST = torch.finfo(torch.float16).max


def check_spec(spec: Spec) -> None:
    """Refuse what cannot be a row of a cache.

    Raises:
        UsageError: scales or a codebook that need more than a row, or other ways to store.
    """
    if spec.is_left_alone:
        raise UsageError(
            f"--kv: {spec} of keys or values does not go with k bits of the other; name two specs"
        )
    strange = {
        "has a codebook fitted to all of a weight": spec.is_fitted,
        "divides by signed scales": spec.is_signed,
        "has zero points at a minimum": spec.is_from_minimum or spec.has_integer_zeros,
        "stores scales with those of other rows": spec.has_double_quant or bool(spec.scale_bits),
        "keeps outlier features": bool(spec.outliers),
        "is for products in integers": spec.has_int8_inputs,
    }
    reason = next((reason for reason, is_so in strange.items() if is_so), None)
    if reason is not None:
        raise UsageError(
            f"--kv {spec}: it {reason}; a cache takes fp16, int8:64, nf4:64, int4:32+zp and the like"
        )


class PackedRows:
    """See the file's docstring, and `Rows`.

    Attributes:
        spec: of a row.
        size: of a head.
        planes: (room, heads, row_bytes) uint8; rows of the first tokens are not used.
        scales: (room, heads, blocks) float16.
        zeros: likewise; None without ``+zp``.
        first: (`FIRST`, heads, size) float16 rows of the first tokens.
        ways: (3, heads, size) float32 of keys: sums of q^2 over these tokens and the heads of a group; the
            centre; the factors, 0 until they are known. None of values.
    """

    def __init__(self, spec: Spec, room: int, heads: int, size: int, *, is_keys: bool) -> None:
        blocks = -(-size // spec.block)
        self.spec, self.size = spec, size
        self.codebook = shared_codebook(spec)
        self.planes = torch.zeros(room, heads, bit_planes.row_bytes(size, spec.bits), dtype=torch.uint8)
        self.scales = torch.zeros(room, heads, blocks, dtype=torch.float16)
        self.zeros = torch.zeros_like(self.scales) if spec.has_zero_point else None
        self.first = torch.zeros(FIRST, heads, size, dtype=torch.float16)
        self.ways = torch.zeros(3, heads, size) if is_keys else None

    def grow(self, used: int, room: int) -> None:
        """See `Rows`."""
        self.planes, self.scales = (moved(part, used, room) for part in (self.planes, self.scales))
        if self.zeros is not None:
            self.zeros = moved(self.zeros, used, room)

    def addresses(self) -> list[int]:
        """See `Rows`: planes, scales, first, ways, zeros; 0 for what is not there."""
        parts = (self.planes, self.scales, self.first, self.ways, self.zeros)
        return [0 if part is None else part.data_ptr() for part in parts]

    def write(self, start: int, rows: Tensor) -> None:
        """See `Rows`. Who writes here and not through the native step has no queries to say factors with."""
        rows = rows.float()
        if start == 0 and self.ways is not None:
            self.ways.zero_()
        early = max(0, min(FIRST - start, len(rows)))
        self.first[start : start + early] = _half(self._turned(rows[:early]))
        if early < len(rows):
            if not self._is_settled:
                self._settle()
            self._pack(start + early, self._turned(rows[early:]))

    def read(self, length: int, dtype: torch.dtype) -> Tensor:
        """See `Rows`."""
        early = self.first[:length].float()
        if length <= FIRST:
            return self._back(early).to(dtype)
        later = slice(FIRST, length)
        planes, scales = self.planes[later].flatten(0, 1), self.scales[later].flatten(0, 1)
        zeros = None if self.zeros is None else self.zeros[later].flatten(0, 1)
        packed = Operands(
            *(planes, scales, self.codebook, zeros, None, None, None, None, None),
            *(self.size, self.spec.bits, self.spec.block),
        )
        late = torch.ops.kbit.dequantize(*packed, torch.float32).view(-1, *early.shape[1:])
        return self._back(torch.cat([early, late])).to(dtype)

    @property
    def _is_settled(self) -> bool:
        """Whether keys lie turned; values always lie as they are."""
        return self.ways is None or bool(self.ways[2, 0, 0] != 0)

    def _settle(self) -> None:
        assert self.ways is not None
        early = self.first.float()
        centre = early.mean(dim=0)
        squares = torch.stack([self.ways[0], (early - centre).square().sum(dim=0)])
        means = squares.mean(dim=-1, keepdim=True)
        queries, keys = torch.where(means > 0, squares.maximum(LEAST * means), 1.0)
        factors = (queries / keys).sqrt().sqrt()
        self.ways[1], self.ways[2] = centre, factors / factors.amax(dim=-1, keepdim=True)
        self.first.copy_(_half(self._turned(early)))

    def _turned(self, rows: Tensor) -> Tensor:
        if self.ways is None or not self._is_settled:
            return rows
        return turned((rows - self.ways[1]) * self.ways[2])

    def _back(self, rows: Tensor) -> Tensor:
        if self.ways is None or not self._is_settled:
            return rows
        return turned(rows) / self.ways[2] + self.ways[1]

    def _pack(self, start: int, rows: Tensor) -> None:
        flat = rows.reshape(-1, self.size)
        source = RowTiles(flat, self.spec.block, None)
        blocks = source.blocks(0, len(flat))
        zeros = None
        if self.zeros is not None:
            low, high = source.limits(blocks)
            zeros = _half(low / 2 + high / 2)
            scales = _half(torch.maximum(high - zeros, zeros - low))
        else:
            scales = _half(absmax(blocks, is_signed=False))
        planes = torch.ops.kbit.encode(
            flat, scales, zeros, self.codebook, None, self.spec.bits, self.spec.block
        )
        for part, values in ((self.planes, planes), (self.scales, scales), (self.zeros, zeros)):
            if part is not None and values is not None:
                part[start : start + len(rows)] = values.view(-1, *part.shape[1:])


def turned(rows: Tensor) -> Tensor:
    """Rows times a Hadamard matrix, orthonormal and its own inverse.

    Args:
        rows: (..., size); blocks of the largest power of 2 that divides the size are turned one by one.
    """
    size = rows.shape[-1]
    whole = size & -size
    out: Tensor = rows.unflatten(-1, (size // whole, whole))
    step = 1
    while step < whole:
        pairs = out.unflatten(-1, (-1, 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        step *= 2
    result: Tensor = out.flatten(-2) * whole**-0.5
    return result


def moved(rows: Tensor, used: int, room: int) -> Tensor:
    """The first ``used`` rows, with room for more."""
    larger = rows.new_zeros(room, *rows.shape[1:])
    larger[:used] = rows[:used]
    return larger


def _half(values: Tensor) -> Tensor:
    """As float16 holds them, float32."""
    return values.clamp(-MOST, MOST).half().float()
