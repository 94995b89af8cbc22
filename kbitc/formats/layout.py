"""What packing stores for a weight, from its spec and shape alone: names, dtypes and shapes of tensors.

The one thing to know: no data is needed, so that bytes can be counted and graphs be lowered before
anything is packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kbitc.formats import bit_planes
from kbitc.formats.codebooks import dynamic_map, shared_codebook
from kbitc.formats.spec import SCALE_GROUP, Spec

SHARED = "kbit.codebook."
SCALE_MAP = f"{SHARED}dynamic8"
LOSS = 1e-3
"""Relative error above which rounding loses something; to a normal float16 it is 4.9e-4 at most."""
CHUNK = 2**22  # values that are compared at once


@dataclass(frozen=True)
class Slot:
    """Room for one stored tensor. A 16-bit float slot takes float16 and bfloat16 alike."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def plain_slot(dtype: torch.dtype, shape: tuple[int, ...]) -> Slot:
    """Room for a tensor that is not packed: floats at 16 bits, others as they are."""
    is_wide = dtype.is_floating_point and dtype.itemsize > 2
    return Slot(torch.float16 if is_wide else dtype, shape)


def plain_dtype(tensor: Tensor, *, is_wide: bool = False, is_summed: bool = False) -> torch.dtype:
    """What a tensor that is no weight is stored in: floats at 16 bits where that loses nothing, else at 32.

    Args:
        tensor: any.
        is_wide: 32 bits, however little 16 would lose.
        is_summed: each row meets others in sums, where an error in a small value drowns: it is judged as a
            whole, and not by each value.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize <= 2:
        return tensor.dtype
    narrow = (torch.float32,) if is_wide else (torch.float16, torch.bfloat16, torch.float32)
    fits = (dtype for dtype in narrow if dtype.itemsize < tensor.dtype.itemsize)
    return next((dtype for dtype in fits if _holds(dtype, tensor, is_summed)), tensor.dtype)


def _holds(dtype: torch.dtype, tensor: Tensor, is_summed: bool) -> bool:
    """Whether rounding to a dtype loses at most `LOSS` of every value, or of every row."""
    values = tensor.detach().squeeze()
    rows = values.flatten(1) if is_summed and values.dim() > 1 else values.reshape(-1, 1)
    for part in rows.split(max(1, CHUNK // max(1, rows.shape[1]))):
        back = part.to(dtype).to(part.dtype)
        error, size = (part - back).double().norm(dim=1), part.double().norm(dim=1)
        is_same = ((part == back) | (part.isnan() & back.isnan())).all(1)  # infinite values among them
        if not bool((is_same | (error <= LOSS * size)).all()):
            return False
    return True


def stored_plain(tensor: Tensor) -> Tensor:
    """A weight as it is stored under the spec fp16: float32 and float64 at 16 bits, others as they are.

    Float16, or bfloat16 (same size, wider range) where float16 would overflow.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize <= 2:
        return tensor
    half = tensor.to(torch.float16)
    return half if bool((half.isfinite() == tensor.isfinite()).all()) else tensor.to(torch.bfloat16)


def weight_slots(spec: Spec, lead: tuple[int, ...], in_features: int) -> dict[str, Slot]:
    """What a ``(*lead, in_features)`` weight stores under its own name, by field; "" is the weight itself.

    Codebooks that weights share are not among it: :func:`shared_codebooks` has them.
    """
    if spec.is_left_alone:
        return {"": plain_slot(torch.float16, (*lead, in_features))}
    return packed_slots(spec, lead, in_features)


def weight_bytes(spec: Spec, lead: tuple[int, ...], in_features: int) -> int:
    """Bytes that a ``(*lead, in_features)`` weight takes, without the codebooks that it shares.

    >>> from kbitc.formats.spec import parse
    >>> weight_bytes(parse("nf4:64"), (10,), 128)  # codes 640, scales 40
    680
    """
    return sum(slot.nbytes for slot in weight_slots(spec, lead, in_features).values())


def shared_bytes(spec: Spec) -> dict[str, int]:
    """Bytes of the codebooks that weights of this spec share, by stored name."""
    return {name: codebook.nbytes for name, codebook in shared_codebooks([spec]).items()}


def packed_slots(spec: Spec, lead: tuple[int, ...], in_features: int) -> dict[str, Slot]:
    """What ``quantize`` stores for a ``(*lead, in_features)`` weight, by field, shared codebooks left out."""
    blocks = math.ceil(in_features / spec.block)
    columns = spec.outlier_count(in_features)
    count = math.prod(lead) * blocks
    slots = {
        "planes": Slot(torch.uint8, (*lead, bit_planes.row_bytes(in_features, spec.bits))),
        "scales": Slot(torch.uint8 if spec.has_double_quant else torch.float16, (*lead, blocks)),
    }
    if spec.is_fitted:
        slots["codebook"] = Slot(torch.float32, (2**spec.bits,))
    if spec.has_zero_point:
        slots["zeros"] = Slot(torch.float16, (*lead, blocks))
    if spec.has_double_quant:
        slots["scale_absmax"] = Slot(torch.float32, (math.ceil(count / SCALE_GROUP),))
        slots["scale_mean"] = Slot(torch.float32, (1,))
    if columns:
        slots["outlier_values"] = Slot(torch.float16, (*lead, columns))
        slots["outlier_index"] = Slot(torch.int32, (columns,))
    return slots


def shared_codebooks(specs: Iterable[Spec]) -> dict[str, Tensor]:
    """The codebooks that weights of these specs share, by stored name."""
    codebooks: dict[str, Tensor] = {}
    for spec in specs:
        if spec.is_left_alone:
            continue
        if spec.has_double_quant:
            codebooks[SCALE_MAP] = dynamic_map()
        if not spec.is_fitted:
            codebooks.setdefault(SHARED + spec.codebook_name, shared_codebook(spec))
    return dict(sorted(codebooks.items()))


def operand_slots(
    name: str, spec: Spec, lead: tuple[int, ...], in_features: int
) -> dict[str, tuple[str, Slot]]:
    """All tensors that read a packed ``(*lead, in_features)`` weight: field to stored name and slot.

    The codebooks that it shares with other weights are among them.
    """
    own = packed_slots(spec, lead, in_features)
    operands = {field: (f"{name}.{field}", slot) for field, slot in own.items()}
    shared = {"codebook": SHARED + spec.codebook_name, "scale_codebook": SCALE_MAP}
    codebooks = shared_codebooks([spec])
    for field, stored in shared.items():
        if stored in codebooks and (field == "codebook" or spec.has_double_quant):
            codebook = codebooks[stored]
            operands.setdefault(field, (stored, Slot(codebook.dtype, tuple(codebook.shape))))
    return operands
