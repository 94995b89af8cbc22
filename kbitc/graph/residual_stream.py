"""The values that turn together when the residual stream is rotated, and the weights around them.

The one thing to know: a value x (..., features) may become x R, R orthogonal, where everything that makes it
is linear in the features and everything that reads it is a weight, a sum, a factor of the whole token, or a
norm: the size of a token stays, and with R 1 = 1 so does its mean, so that LayerNorm needs no change either.
Norms count as read through; their gains must be ones by then. No name of a module is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from kbitc.graph.feature_flow import SHIFT, SIZES, own_vector, scale_of
from kbitc.graph.program import CANONICAL, Program
from kbitc.graph.weight_reads import is_idle_dropout, keeps_features, op_name

Obstacle = Callable[[str], "str | None"]
"""Why the gain of a norm, by its name, cannot be moved into the weights that read it; None if it can."""

_NORMS = ("layer_norm", "rms_norm")
_CASTS = ("to", "_to_copy", "type_as")
_NARROWEST = 2  # features


@dataclass
class Stream:
    """One residual stream.

    Attributes:
        width: features.
        inner: names of weights whose input features, or table whose features, are the stream's.
        outer: names of weights whose rows make it.
        vectors: names of what is added to it, the shifts of norms included.
        gains: names of the gains of its norms.
        is_centred: one of its norms subtracts the mean.
        reason: why it cannot be rotated; "" if it can.
    """

    width: int
    inner: list[str] = field(default_factory=list)
    outer: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    is_centred: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """How reports call it: by the first tensor around it."""
        return next(iter((*self.inner, *self.outer, *self.gains)), "a stream")


def streams(program: Program, obstacle: Obstacle) -> Iterator[Stream]:
    """The residual stream of every norm, each once.

    Args:
        program: canonical.
        obstacle: of the gains of norms.
    """
    seen: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        start = _normed(node)
        if start is not None and start not in seen and _width(start) >= _NARROWEST:
            walk = _Walk(program, obstacle, Stream(_width(start)))
            yield walk.run(start)
            seen |= walk.values


@dataclass
class _Walk:
    program: Program
    obstacle: Obstacle
    stream: Stream
    values: set[fx.Node] = field(default_factory=set)
    calls: dict[str, dict[fx.Node, list[int]]] = field(default_factory=dict)  # by weight: its sides in each

    def run(self, start: fx.Node) -> Stream:
        """Takes in all values that turn with ``start``, whatever hinders: no other walk shall meet them."""
        stack = [start]
        while stack:
            value = stack.pop()
            if value in self.values:
                continue
            self.values.add(value)
            stack.extend(self._made(value))
            for user in value.users:
                if op_name(user) not in SIZES:
                    stack.extend(self._read(value, user))
        for name, calls in self.calls.items():
            sides = [sorted(set(own)) for own in calls.values()]
            if len(calls) != len(self.program.weights[name].uses) or sides != sides[:1] * len(sides):
                self._refuse(f"'{name}' is read in another way as well")
        return self.stream

    def _refuse(self, reason: str) -> list[fx.Node]:
        self.stream.reason = self.stream.reason or reason
        return []

    def _made(self, value: fx.Node) -> list[fx.Node]:
        """The values that this one turns with, of those that it is made of; notes weights and vectors."""
        kind = CANONICAL.get(value.target, "") if value.op == "call_function" else ""  # type: ignore[arg-type]
        if kind:
            self._note(value, self.stream.inner if kind == "embedding" else self.stream.outer)
            bias = value.args[2] if kind == "linear" and len(value.args) > 2 else None
            if bias is not None:
                self._add_vector(bias)
            return []
        if value.op != "call_function":
            return self._refuse(f"the input '{value.name}' is added to it")
        return self._through(value) or self._refuse(f"{op_name(value)} makes it")

    def _read(self, value: fx.Node, user: fx.Node) -> list[fx.Node]:
        """The values that turn with this one, of those that are made of it; notes weights."""
        kind = CANONICAL.get(user.target, "") if user.op == "call_function" else ""  # type: ignore[arg-type]
        if kind and user.args[0] is value and value not in user.args[1:]:
            self._note(user, self.stream.inner)
            return []
        if _is_size(user):
            return []
        if user.op == "output":
            return self._refuse("the model returns it")
        return [user] if value in self._through(user) else self._refuse(f"{op_name(user)} reads it")

    def _through(self, node: fx.Node) -> list[fx.Node]:
        """Operands that turn with a node's value; none where it is no operation that turns."""
        short = op_name(node).rpartition(".")[2] if node.op == "call_function" else ""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if not operands or _width(node) != self.stream.width:
            return []
        if short in _NORMS:
            return self._norm(node) if node.args[1] == [self.stream.width] else []
        scale = scale_of(self.program, node) if short == "mul" else None
        if scale is not None:
            self._add_gain(scale)
            return [operand for operand in operands if operand is not scale]
        wide = [operand for operand in operands if _width(operand) == self.stream.width]
        if short in ("add", "sub") and "alpha" not in node.kwargs and len(operands) == len(node.args):
            vectors = [each for each in wide if own_vector(self.program, each) is not None]
            for each in vectors:
                self._add_vector(each)
            return [each for each in wide if each not in vectors] if len(wide) == len(operands) else []
        if short in ("mul", "div"):
            is_whole = len(wide) == 1 and all(_width(each) == 1 for each in operands if each is not wide[0])
            return wide if is_whole and (short == "mul" or node.args[0] is wide[0]) else []
        if short == "sum" and _keeps_last(node):
            return wide
        is_moved = keeps_features(node) or short in _CASTS or is_idle_dropout(node)
        return operands[:1] if is_moved and operands[:1] == wide[:1] and _is_float(node) else []

    def _norm(self, node: fx.Node) -> list[fx.Node]:
        first, gain = node.args[0], node.args[2] if len(node.args) > 2 else None
        if isinstance(gain, fx.Node):
            self._add_gain(gain)
        if op_name(node) == "aten.layer_norm":
            self.stream.is_centred = True
            shift = node.args[SHIFT] if len(node.args) > SHIFT else None
            if shift is not None:
                self._add_vector(shift)
        return [first] if isinstance(first, fx.Node) else []

    def _add_gain(self, gain: fx.Node) -> None:
        name = self.program.parameters.get(gain.name, gain.name)
        if name in self.stream.gains:
            return
        self.stream.gains.append(name)
        reason = self.obstacle(name)
        if reason is not None:
            self._refuse(f"the gain '{name}' cannot be moved into the weights after it: {reason}")

    def _add_vector(self, node: object) -> None:
        name = own_vector(self.program, node)
        if name is None:
            self._refuse("what is added to it is no parameter, or read in several places")
        elif name not in self.stream.vectors:
            self.stream.vectors.append(name)

    def _note(self, call: fx.Node, side: list[str]) -> None:
        operand = call.args[1]
        name = self.program.parameters.get(operand.name, "") if isinstance(operand, fx.Node) else ""
        weight = self.program.weights.get(name)
        if weight is None or weight.view_of is not None:
            self._refuse(f"{op_name(call)} takes a weight that is not stored as it is used")
        elif call.kwargs.get("is_transposed", False) != weight.is_transposed:
            self._refuse(f"'{name}' is read turned")
        else:
            if name not in side:
                side.append(name)
            self.calls.setdefault(name, {}).setdefault(call, []).append(side is self.stream.inner)


def _normed(node: fx.Node) -> fx.Node | None:
    """The value that a node takes the size of, or normalizes."""
    is_norm = node.op == "call_function" and op_name(node) in ("aten.layer_norm", "aten.rms_norm")
    value = node.args[0] if is_norm or _is_size(node) else None
    return value if isinstance(value, fx.Node) else None


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a square that nobody but a mean over the features reads."""
    if op_name(node) != "aten.pow" or node.args[1] != 2:
        return False
    readers = [user for user in node.users if op_name(user) not in SIZES]
    return bool(readers) and all(
        op_name(user) in ("aten.mean", "aten.sum") and user.args[1:2] in (([-1],), (-1,)) for user in readers
    )


def _keeps_last(node: fx.Node) -> bool:
    """Whether a sum leaves the features alone."""
    dims, first = node.args[1] if len(node.args) > 1 else None, node.args[0]
    assert isinstance(first, fx.Node)
    rank = first.meta["val"].dim()
    return isinstance(dims, (list, tuple)) and bool(dims) and all(dim % rank != rank - 1 for dim in dims)  # type: ignore[operator]


def _width(node: fx.Node) -> int:
    value = node.meta.get("val")
    size = value.shape[-1] if isinstance(value, Tensor) and value.dim() else 0
    return size if isinstance(size, int) else 0


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
