"""Which layer a weight belongs to, and which role it has there: read from its name.

The one thing to know: a number that is a whole part of a name counts layers, the first such number before any
other; what stands before and after it is the role, digits and all. So ``wi_0`` and ``wi_1`` are two roles,
and so are expert 4 and expert 5 of a layer: one weight of each layer has a role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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

    @property
    def pattern(self) -> str:
        """The names of its weights, with a star for the layer."""
        return f"{self.stack}.*.{self.part}" if self.has_layers else self.part


def role_of(name: str) -> tuple[Role, int]:
    """The role and the layer of a weight; layer 0 for one that is in no layer.

    >>> role_of("model.layers.12.self_attn.q_proj.weight")
    (Role(stack='model.layers', part='self_attn.q_proj.weight', has_layers=True), 12)
    >>> role_of("encoder.block.3.layer.1.DenseReluDense.wi_0.weight")[0].pattern
    'encoder.block.*.layer.1.DenseReluDense.wi_0.weight'
    >>> role_of("lm_head.weight")[0].name
    'lm_head'
    """
    return next(_readings(name), (Role("", name, has_layers=False), 0))


def by_role(names: Iterable[str]) -> Mapping[Role, dict[int, str]]:
    """Names by role and layer, in the order of first appearance."""
    roles: dict[Role, dict[int, str]] = {}
    for name in names:
        role, layer = role_of(name)
        roles.setdefault(role, {})[layer] = name
    return roles


def repeated(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Names of weights of one role and one shape, two or more, in the order of first appearance.

    Where a model's first number counts stages whose shapes differ, as in Swin, the next one counts its
    layers: what is alone at one number of its name is looked at again at the next.

    >>> repeated({"h.0.wi_0": (2, 3), "h.0.wi_1": (2, 3), "h.1.wi_0": (2, 3), "h.1.wi_1": (2, 3)})
    [('h.0.wi_0', 'h.1.wi_0'), ('h.0.wi_1', 'h.1.wi_1')]
    >>> repeated({"st.0.block.0.q": (4, 4), "st.0.block.1.q": (4, 4), "st.1.block.0.q": (8, 8)})
    [('st.0.block.0.q', 'st.0.block.1.q')]
    """
    order = {name: i for i, name in enumerate(shapes)}
    alone = {name: [role for role, _ in _readings(name)] for name in shapes}
    groups: list[tuple[str, ...]] = []
    for depth in range(max(map(len, alone.values()), default=0)):
        members: dict[object, list[str]] = {}
        for name, roles in alone.items():
            if depth < len(roles):
                members.setdefault((roles[depth], shapes[name]), []).append(name)
        together = [tuple(names) for names in members.values() if len(names) > 1]
        groups += together
        for name in (name for names in together for name in names):
            del alone[name]
    return sorted(groups, key=lambda names: order[names[0]])


def _readings(name: str) -> Iterator[tuple[Role, int]]:
    """The role and the layer that each number of a name makes, the first one first."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) < 6 and 0 < i < len(parts) - 1:
            yield Role(".".join(parts[:i]), ".".join(parts[i + 1 :]), has_layers=True), int(part)
