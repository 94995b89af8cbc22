"""Which outputs of a weight, or of a norm, meet which input features of the weights that read them.

The one thing to know: the outputs of a maker are numbered, and the numbers are moved through the graph as its
values are. A *unit* whose every way leads, through operations that commute with a positive factor, into input
features of weights is free: divide what makes it by s and multiply those columns by s, and no other value
changes. No name of a module is looked at; attention and experts need no rule of their own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kbitc.graph import weight_reads
from kbitc.graph.program import CANONICAL, Program, Weight
from kbitc.graph.weight_reads import CHECKS, is_idle_dropout, is_move, keeps_features, op_name, reads_of

SCALES = {"aten.mul": (0, 1), "aten.layer_norm": (2,), "aten.rms_norm": (2,)}
"""Calls that multiply by a parameter, and which of their arguments that is."""
SIZES = (*CHECKS, "aten.sym_size", "aten.sym_numel")
"""Calls that see a value's size and type alone."""
SHIFT = 3  # the argument of aten.layer_norm that is added
GROUPED = "grouped_linear"

_HOMOGENEOUS = ("relu", "relu_", "neg", "abs", "leaky_relu")
_CASTS = ("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "lift_fresh")
_VALUES = {"scaled_dot_product_attention": 2, "matmul": 1, "bmm": 1, "mm": 1}
Units: TypeAlias = "Tensor | list[Tensor]"


@dataclass(frozen=True)
class Reader:
    """One weight that takes units as input features.

    Attributes:
        weight: the weight, with this one use.
        units: ``(in_features,)`` int64: which unit each input feature is.
    """

    weight: Weight
    units: Tensor


@dataclass(frozen=True)
class Flow:
    """The units of one maker.

    Attributes:
        name: of the stored tensor that makes them: a weight's, or the gain's of a norm.
        weight: the same, where it is a weight; its rows are the units.
        is_per_expert: a unit of each expert of the weight is one of its own, and its readers keep experts.
        vectors: 1-D parameters that are divided along, and which unit each of their values is.
        readers: in the order of the graph.
        free: ``(units,)`` bool; nobody else sees those.
        reason: why units are not free, of the first that is not; "" where all are.
    """

    name: str
    weight: Weight | None
    is_per_expert: bool
    vectors: dict[str, Tensor]
    readers: tuple[Reader, ...]
    free: Tensor
    reason: str


def flows(program: Program) -> Iterator[Flow]:
    """The flow of every norm and weight whose outputs are numbered, in the order of the graph.

    Those without readers, or without a free unit that one reads, are there too, with a reason.

    Args:
        program: canonical, captured at plain sizes.
    """
    order = {node: i for i, node in enumerate(program.graph.graph.nodes)}
    for node in order:
        walk = _start(program, node)
        if walk is not None:
            yield walk.flow(order)


def own_vector(program: Program, node: object) -> str | None:
    """The name of a 1-D parameter that is read in one place, so that its values are free to change."""
    if not isinstance(node, fx.Node):
        return None
    rest = program.rest.get(program.parameters.get(node.name, ""))
    is_own = rest is not None and rest.is_parameter and len(rest.shape) == 1 and len(reads_of(node)) == 1
    return rest.name if rest is not None and is_own else None


def own_weight(program: Program, call: fx.Node) -> Weight | None:
    """The weight of a canonical matmul, if nothing else reads it and it is stored as it is used."""
    operand = call.args[1]
    if not isinstance(operand, fx.Node) or len(operand.users) > 1:
        return None
    weight = program.weights.get(program.parameters.get(operand.name, ""))
    if weight is None or len(weight.uses) > 1 or weight.view_of is not None:
        return None
    return weight if call.kwargs.get("is_transposed", False) == weight.is_transposed else None


def scale_of(program: Program, node: fx.Node) -> fx.Node | None:
    """The 1-D parameter by which a call multiplies the features of a value; None where it is no such call."""
    for at in SCALES.get(op_name(node), ()):
        scale = node.args[at] if len(node.args) > at else None
        value = node.meta.get("val")
        if own_vector(program, scale) is None or not isinstance(value, Tensor):
            continue
        assert isinstance(scale, fx.Node)
        if value.shape[-1:] == weight_reads.value_of(scale).shape:
            return scale
    return None


def _start(program: Program, node: fx.Node) -> _Walk | None:
    """A walk from a node whose outputs can be numbered; None from any other."""
    shape = _shape(node)
    if node.op != "call_function" or shape is None or not _is_float(node):
        return None
    kind = CANONICAL.get(node.target, "")  # type: ignore[arg-type]  # a string for other nodes
    if kind in ("linear", GROUPED):
        weight = own_weight(program, node)
        is_grouped = kind == GROUPED
        return None if weight is None else _from_weight(program, node, weight, shape, is_grouped=is_grouped)
    scale = scale_of(program, node)
    name = own_vector(program, scale)
    if name is None:
        return None
    units = torch.arange(shape[-1])
    vectors = {name: units}
    shift = node.args[SHIFT] if op_name(node) == "aten.layer_norm" and len(node.args) > SHIFT else None
    if shift is not None:
        added = own_vector(program, shift)
        if added is None:
            return None
        vectors[added] = units
    return _Walk(program, node, name, None, units.expand(shape), len(units), vectors)


def _from_weight(
    program: Program, node: fx.Node, weight: Weight, shape: tuple[int, ...], *, is_grouped: bool
) -> _Walk | None:
    units = torch.arange(shape[-1])
    labels = units.expand(shape)
    if is_grouped:  # also numbered by tokens, so that a change of their order is seen
        labels = labels + len(units) * torch.arange(shape[0])[:, None]
        return _Walk(program, node, weight.name, weight, labels, len(units), {})
    bias = node.args[2] if len(node.args) > 2 else None
    vectors = {}
    if bias is not None:
        name = own_vector(program, bias)
        if name is None:
            return None
        vectors[name] = units
    return _Walk(program, node, weight.name, weight, labels, len(units), vectors)


@dataclass
class _Walk:
    """Numbers on their way from one maker: for each value that carries them, a tensor of its shape."""

    program: Program
    maker: fx.Node
    name: str
    weight: Weight | None
    first: Tensor
    count: int
    vectors: dict[str, Tensor]
    readers: list[Reader] = field(default_factory=list)
    reason: str = ""

    def flow(self, order: dict[fx.Node, int]) -> Flow:
        """Follows the numbers to their ends."""
        self.free = torch.ones(self.count, dtype=torch.bool)
        self.values: dict[fx.Node, Units] = {self.maker: self.first}
        heap = [(order[user], user) for user in self.maker.users]
        heapq.heapify(heap)
        done: set[fx.Node] = set()
        while heap and self.free.any():
            node = heapq.heappop(heap)[1]
            if node in done or op_name(node) in SIZES:
                continue
            done.add(node)
            units = self._through(node)
            if units is not None:
                self.values[node] = units
                for user in node.users:
                    heapq.heappush(heap, (order[user], user))
        return Flow(
            *(self.name, self.weight, self._is_grouped, self.vectors, tuple(self.readers)),
            *(self.free, self.reason or ("" if self.readers else "nothing reads it")),
        )

    @property
    def _is_grouped(self) -> bool:
        return self.maker.op == "call_function" and CANONICAL.get(self.maker.target) == GROUPED  # type: ignore[arg-type]

    def _through(self, node: fx.Node) -> Units | None:
        """The numbers of a node's value; None where they end: in a weight, or where they are seen."""
        carried = [operand for operand in node.all_input_nodes if operand in self.values]
        if len(carried) > 1 and _values_of(node) in carried:  # queries and keys of the same weight as values
            self._pin(node, (operand for operand in carried if operand is not _values_of(node)))
            carried = [operand for operand in carried if operand is _values_of(node)]
        units = self._moved(node, carried[0]) if len(carried) == 1 else self._joined(node, carried)
        if units is None and not self._is_read(node, carried):
            self._pin(node, carried)
        return units

    def _pin(self, node: fx.Node, carried: Iterable[fx.Node]) -> None:
        """Somebody sees these units: they keep their scale."""
        for operand in carried:
            for units in pytree.tree_leaves(self.values[operand]):
                self.free[units.flatten() % self.count] = False
        self.reason = self.reason or f"its result is {self._reading(node)}"

    def _reading(self, node: fx.Node) -> str:
        if node.op == "output":
            return "returned by the model"
        operand = node.args[1] if CANONICAL.get(node.target) else None  # type: ignore[arg-type]
        name = self.program.parameters.get(operand.name) if isinstance(operand, fx.Node) else None
        if name in self.program.weights and own_weight(self.program, node) is None:
            return f"read by '{name}', which has other readers"
        return f"read by {op_name(node)}"

    def _joined(self, node: fx.Node, carried: list[fx.Node]) -> Units | None:
        """Of a call with several numbered operands: a sum, of the same units each."""
        one, *others = [self.values[operand] for operand in carried]
        is_sum = _short(node) in ("add", "sub") and "alpha" not in node.kwargs
        shape = _shape(node)
        if not is_sum or shape is None or not all(isinstance(units, Tensor) for units in (one, *others)):
            return None
        wide = [torch.broadcast_to(units, shape) for units in (one, *others)]  # type: ignore[arg-type]
        return wide[0] if all(torch.equal(wide[0], each) for each in wide[1:]) else None

    def _moved(self, node: fx.Node, operand: fx.Node) -> Units | None:
        """Of a call with one numbered operand, through which a positive factor passes."""
        units, short = self.values[operand], _short(node)
        if node.op != "call_function" or sum(a is operand for a in pytree.tree_leaves(node.args)) != 1:
            return None
        if short == "getitem" and isinstance(units, list):
            return units[int(node.args[1])]  # type: ignore[arg-type]
        if isinstance(units, list):
            return None
        shape = _shape(node)
        if short in ("mul", "div") and shape is not None:
            is_factor = short == "mul" or node.args[0] is operand
            return torch.broadcast_to(units, shape) if is_factor and _is_float(node) else None
        if short in ("add", "sub") and not node.kwargs:
            return self._with_vector(node, operand, units)
        if short in _HOMOGENEOUS and node.args[0] is operand:
            return units
        if operand is _values_of(node):
            return _mixed(node, units)
        if is_move(node) and node.args[0] is operand:
            return _replayed(node, units)
        return None

    def _with_vector(self, node: fx.Node, operand: fx.Node, units: Tensor) -> Tensor | None:
        """``value + b``, b a parameter of the features that is then divided along."""
        other = next(arg for arg in node.args[:2] if arg is not operand)
        name, features = own_vector(self.program, other), _features(units)
        if name is None or features is None or self.program.rest[name].shape != features.shape:
            return None
        self.vectors[name] = features
        return units

    def _is_read(self, node: fx.Node, carried: list[fx.Node]) -> bool:
        """Whether a weight takes the numbered value as its input features, and nothing else does here."""
        kind = CANONICAL.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
        if kind not in ("linear", GROUPED) or carried != [node.args[0]]:
            return False
        weight, units = own_weight(self.program, node), self.values[carried[0]]
        if weight is None or not isinstance(units, Tensor):
            return False
        features = self._features_of_experts(node, units) if self._is_grouped else _features(units)
        if features is None:
            return False
        self.readers.append(Reader(weight, features))
        return True

    def _features_of_experts(self, node: fx.Node, units: Tensor) -> Tensor | None:
        """The units of a reader with the experts of the maker, token by token."""
        is_same = CANONICAL.get(node.target) == GROUPED and node.args[2] is self.maker.args[2]  # type: ignore[arg-type]
        expected = units[:1] + self.count * torch.arange(len(units))[:, None]
        return units[0] if is_same and torch.equal(units, expected) else None


def _short(node: fx.Node) -> str:
    return op_name(node).rpartition(".")[2] if node.op == "call_function" else ""


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value; sizes that depend on data are as good as two."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else 2 for size in value.shape)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _features(units: Tensor) -> Tensor | None:
    """The units of the last dimension, where all others see the same."""
    rows = units.reshape(-1, units.shape[-1])
    return rows[0] if len(rows) and bool((rows == rows[:1]).all()) else None


def _values_of(node: fx.Node) -> object:
    """The operand whose features are those of ``weights @ values``, in attention or plain."""
    at = _VALUES.get(_short(node), len(node.args))
    return node.args[at] if len(node.args) > at else None


def _mixed(node: fx.Node, units: Tensor) -> Tensor | None:
    """Of ``weights @ values``: each feature is a sum over positions of the same feature."""
    shape = _shape(node)
    if shape is None or units.dim() < 2:
        return None
    first = units[..., :1, :]
    if not bool((units == first).all()):
        return None
    if units.dim() > 2 and node.kwargs.get("enable_gqa"):
        first = first.repeat_interleave(shape[-3] // first.shape[-3], dim=-3)
    return torch.broadcast_to(first, shape)


def _replayed(node: fx.Node, units: Tensor) -> Units | None:
    """The move of a value, done to its numbers."""
    shape, features = _shape(node), _features(units)
    if shape is not None and (not _is_float(node) or 0 in shape):
        return None
    if shape is not None and features is not None and keeps_features(node):
        return features.expand(shape)
    if _short(node) in _CASTS or is_idle_dropout(node):
        return units if shape == units.shape else None
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves((node.args[1:], node.kwargs))):
        return None
    target: Any = node.target
    moved = target(units, *node.args[1:], **node.kwargs)
    return list(moved) if isinstance(moved, (list, tuple)) else moved  # type: ignore[no-any-return]
