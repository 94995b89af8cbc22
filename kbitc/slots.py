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

from kbitc import blockwise, datatypes, packing
from kbitc.spec import SCALE_GROUP, Spec

SHARED = "kbit.codebook."
SCALE_MAP = f"{SHARED}dynamic8"


@dataclass(frozen=True)
class Slot:
    """Room for one stored tensor. A 16-bit float slot takes float16 and bfloat16 alike."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def packed_slots(spec: Spec, lead: tuple[int, ...], in_features: int) -> dict[str, Slot]:
    """What ``quantize`` stores for a ``(*lead, in_features)`` weight, by field, shared codebooks left out."""
    blocks = math.ceil(in_features / spec.block)
    columns = spec.outlier_count(in_features)
    count = math.prod(lead) * blocks
    slots = {
        "planes": Slot(torch.uint8, (*lead, packing.row_bytes(in_features, spec.bits))),
        "scales": Slot(torch.uint8 if spec.has_double_quant else torch.float16, (*lead, blocks)),
    }
    if datatypes.FAMILIES[spec.family].is_fitted:
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
    found: dict[str, Tensor] = {}
    for spec in specs:
        if spec.is_left_alone:
            continue
        if spec.has_double_quant:
            found[SCALE_MAP] = blockwise.dynamic_map()
        if not datatypes.FAMILIES[spec.family].is_fitted:
            found.setdefault(SHARED + spec.codebook_name, blockwise.shared_codebook(spec))
    return dict(sorted(found.items()))


def operand_slots(
    name: str, spec: Spec, lead: tuple[int, ...], in_features: int
) -> dict[str, tuple[str, Slot]]:
    """All tensors that read a packed ``(*lead, in_features)`` weight: field to stored name and slot.

    The codebooks that it shares with other weights are among them.
    """
    own = packed_slots(spec, lead, in_features)
    found = {field: (f"{name}.{field}", slot) for field, slot in own.items()}
    shared = {"codebook": SHARED + spec.codebook_name, "scale_codebook": SCALE_MAP}
    codebooks = shared_codebooks([spec])
    for field, stored in shared.items():
        if stored in codebooks and (field == "codebook" or spec.has_double_quant):
            found.setdefault(field, (stored, Slot(codebooks[stored].dtype, tuple(codebooks[stored].shape))))
    return found
