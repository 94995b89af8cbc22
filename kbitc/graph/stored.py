"""What the artifact of a program stores: every tensor, from shapes and the plan alone.

The one thing to know: bytes are counted here for a whole model and in `kbitc.formats.layout` for one
weight, and nowhere else.
"""

from __future__ import annotations

from kbitc.formats.layout import Slot, plain_slot, shared_codebooks, weight_slots
from kbitc.graph.program import Program

CODEBOOKS = "(shared codebooks)"
"""The unit of the codebooks that weights share."""


def stored_slots(program: Program) -> dict[str, dict[str, Slot]]:
    """Every tensor that the artifact of a planned program holds, by source tensor and stored name."""
    assert program.plan is not None
    specs = {name: choice.spec for name, choice in program.plan.weights.items()}
    units: dict[str, dict[str, Slot]] = {}
    shared = shared_codebooks(specs.values())
    if shared:
        units[CODEBOOKS] = {key: Slot(t.dtype, tuple(t.shape)) for key, t in shared.items()}
    for name, weight in program.weights.items():
        if specs[name].is_left_alone:
            units[name] = {name: plain_slot(weight.dtype, weight.shape)}
            continue
        fields = weight_slots(specs[name], weight.oriented_shape[:-1], weight.in_features)
        units[name] = {f"{name}.{field}": slot for field, slot in fields.items()}
    for name, rest in program.rest.items():
        units[name] = {name: rest.slot}
    return units


def stored_bytes(program: Program) -> int:
    """Exact bytes of all tensors of the artifact of a planned program."""
    return sum(slot.nbytes for unit in stored_slots(program).values() for slot in unit.values())


def rest_bytes(program: Program) -> int:
    """Bytes that no choice changes: everything that is no weight."""
    return sum(rest.slot.nbytes for rest in program.rest.values())
