"""Which layer a weight belongs to, and which role it has there: read from its name.

The one thing to know: the first number of a name is the layer; what stands before and after it is the role,
so that nothing has to know how a family calls its projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """What weights of different layers have in common.

    Attributes:
        stack: what stands before the layer's number.
        part: what stands after it; the whole name for a weight that is in no layer.
        has_layers: False for a weight that is in no layer.
    """

    stack: str
    part: str
    has_layers: bool

    @property
    def name(self) -> str:
        """Short, without "weight"."""
        return self.part.removesuffix(".weight")


def role_of(name: str) -> tuple[Role, int]:
    """The role and the layer of a weight; layer 0 for one that is in no layer.

    >>> role_of("model.layers.12.self_attn.q_proj.weight")
    (Role(stack='model.layers', part='self_attn.q_proj.weight', has_layers=True), 12)
    >>> role_of("lm_head.weight")[0].name
    'lm_head'
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) < 6 and 0 < i < len(parts) - 1:
            return Role(".".join(parts[:i]), ".".join(parts[i + 1 :]), has_layers=True), int(part)
    return Role("", name, has_layers=False), 0


def by_role(names: Iterable[str]) -> Mapping[Role, dict[int, str]]:
    """Names by role and layer, in the order of first appearance."""
    found: dict[Role, dict[int, str]] = {}
    for name in names:
        role, layer = role_of(name)
        found.setdefault(role, {})[layer] = name
    return found
