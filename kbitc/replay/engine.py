"""The replay: a canonical graph, node by node, for all inputs at once.

The one thing to know: the graph is cut before each stop (`kbitc.replay.stops`). A step runs the nodes between
two cuts, input after input, on one core each; what later nodes still read waits on a shelf. Memory is one cut
of the graph and the weights of one step, and the results do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kbitc.graph.context import ReadTensor
from kbitc.graph.program import Program
from kbitc.replay.stops import Stop, WeightRead, stops, weight_reads
from kbitc.replay.values import Pair, Shelf, Values, has_pair, is_pair, of_packed, of_source, storages
from kbitc.sensitivity.streaming import each_expert, writes
from kbitc.system.memory import give_back
from kbitc.tensor.cores import cores

ROOM = 1 << 29  # bytes of values that wait in memory; more go to a file

Dequantized = Callable[[str], Tensor | None]
"""A weight's packed values, with its input dimension last; None where it is to stay as the source has it."""

Outputs = Callable[[int, list[Any], list[Any]], object]
"""Called with an input's index and the flat outputs of the source and of the packed model, on one core."""


@dataclass(frozen=True)
class Replay:
    """One way through a model.

    Attributes:
        program: canonical, captured in float32 at the shapes of the inputs.
        read: a tensor of the source by name.
        dequantized: asked for each weight when a step reads it; None for a replay of the source alone.
        feeds: the inputs, by the names of forward's parameters.
        room: bytes of values that wait in memory.
    """

    program: Program
    read: ReadTensor
    feeds: Sequence[Mapping[str, Any]]
    dequantized: Dequantized | None = None
    room: int = ROOM

    def run(
        self,
        outputs: Outputs | None = None,
        judged: Collection[int] = frozenset(),
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> Iterator[Inputs]:
        """Each stop with its inputs at hand; whoever iterates quantizes its weights before going on.

        Args:
            outputs: called at the end for some inputs, several at a time. Without, nothing runs after the
                last stop.
            judged: indices of those.
            wanted: whether a weight is to be quantized; stops without such are passed by.
        """
        every = (stop for stop in stops(self.program) if any(map(wanted, stop.names)))
        cuts = sorted(every, key=lambda stop: stop.position)
        nodes = list(self.program.graph.graph.nodes)
        last_use = _last_uses(nodes)
        shelf = Shelf(self.room)
        start = 0
        inputs = range(len(self.feeds))
        try:
            for stop in cuts:
                shelf = self._step(shelf, _Span(nodes, start, stop.position, last_use), inputs)
                start = stop.position
                give_back()
                yield Inputs(stop, shelf)
                give_back()
            if outputs is not None:
                rest = _Span(nodes, start, len(nodes), last_use)
                self._step(shelf, rest, sorted(judged), outputs)
        finally:
            shelf.close()

    def _step(
        self,
        before: Shelf,
        span: _Span,
        indices: Sequence[int],
        outputs: Outputs | None = None,
    ) -> Shelf:
        """Run a span for some inputs; gives what later nodes read, and closes ``before``."""
        step = _Step(self, span)
        after = Shelf(self.room)

        def one(index: int) -> Values:
            values = dict(before.get(index)) if span.start else {}
            before.drop(index)
            values = step.run(values, self.feeds[index])
            if outputs is None:
                return values
            flat = pytree.tree_leaves(values[span.nodes[-1]], is_leaf=is_pair)
            outputs(index, of_source(flat), of_packed(flat))
            return {}

        # A few at a time: what is made has to wait for its turn.
        ahead = 2 * torch.get_num_threads()
        for first in range(0, len(indices), ahead):
            some = indices[first : first + ahead]
            for index, values in zip(some, cores().map(one, some), strict=True):
                after.put(index, values)
        before.close()
        return after


@dataclass(frozen=True)
class _Span:
    """Some of a graph's nodes, ``every[start:stop]``."""

    every: Sequence[fx.Node]
    start: int
    stop: int
    last_use: Mapping[fx.Node, int]

    @property
    def nodes(self) -> Sequence[fx.Node]:
        return self.every[self.start : self.stop]


@dataclass(frozen=True)
class Inputs:
    """A stop, and what its weights are to multiply.

    Attributes:
        stop: which.
        shelf: the values that wait.
    """

    stop: Stop
    shelf: Shelf

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """``(tokens, in_features)`` twice: of the source model and of the packed one; may be one tensor."""
        value = self.shelf.get(index)[self.stop.given]
        source = of_source(value).flatten(0, -2)
        return source, of_packed(value).flatten(0, -2) if isinstance(value, Pair) else source

    def expert_slices(self, index: int) -> tuple[Tensor, Tensor]:
        """Cumulative token counts of the experts, in both models."""
        node = self.stop.reads[0].node.args[2]
        value = self.shelf.get(index)[node] if isinstance(node, fx.Node) else node
        return of_source(value), of_packed(value)

    def value(self, index: int, node: fx.Node) -> Any:
        """What another node gave that waits as well; None if it does not."""
        return self.shelf.get(index).get(node)


class _Step:
    """The nodes between two cuts, and the weights that they read."""

    def __init__(self, replay: Replay, span: _Span) -> None:
        self.replay = replay
        self.span = span
        self.interpreter = fx.Interpreter(replay.program.graph)
        own = set(span.nodes)
        self.reads = {read.node: read for read in weight_reads(replay.program) if read.node in own}
        self.constants: dict[str, Tensor] = {}
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        for node in span.nodes:
            self._load(node)

    def _load(self, node: fx.Node) -> None:
        """Everything stored that a node reads."""
        parameters = self.replay.program.parameters
        for arg in node.all_input_nodes:
            name = parameters.get(arg.name) if arg.op == "placeholder" else None
            if name is None or name in self.constants:
                continue
            read = self.reads.get(node)
            if read is not None and arg is node.args[1]:
                if name not in self.weights:
                    self.weights[name] = self._weight(read)
                continue
            tensor = self.replay.read(name)
            self.constants[name] = tensor.float() if tensor.is_floating_point() else tensor

    def _weight(self, read: WeightRead) -> tuple[Tensor, Tensor | None]:
        """Of the source and packed, both as ``(*lead, rows, in_features)`` of the weight's own direction."""
        weight = self.replay.program.weights[read.name]
        data = weight.oriented(self.replay.read(read.name))
        if read.kind != "grouped_linear":
            data = data.float()
        packed = None if self.replay.dequantized is None else self.replay.dequantized(read.name)
        return data, packed

    def run(self, values: Values, feed: Mapping[str, Any]) -> Values:
        """The nodes' values for one input that later steps read; the output node's too."""
        last_use = self.span.last_use
        for i, node in enumerate(self.span.nodes, start=self.span.start):
            if node.op == "placeholder":
                if node.name not in self.replay.program.parameters:
                    values[node] = feed[str(node.target)]
                continue
            values[node] = self._value(node, values)
            for used in node.all_input_nodes:
                if last_use[used] == i:
                    values.pop(used, None)
            if last_use[node] < i and node.op != "output":
                values.pop(node, None)
        return values

    def _value(self, node: fx.Node, values: Values) -> Any:
        if node.op == "get_attr":
            return self.interpreter.fetch_attr(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._operand(arg, values))
        if node.op == "output":
            return args[0]
        read = self.reads.get(node)
        if read is not None:
            return self._read_weight(read, args, kwargs)
        if not has_pair((args, kwargs)):
            return self._call(node, args, kwargs)
        args, kwargs = _own_memory(node, args, kwargs, values)
        source = self._call(node, of_source(args), of_source(kwargs))
        return _paired(source, self._call(node, of_packed(args), of_packed(kwargs)))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _operand(self, node: fx.Node, values: Values) -> Any:
        if node in values:
            return values[node]
        name = self.replay.program.parameters[node.name]
        return self.constants.get(name, name)

    def _read_weight(self, read: WeightRead, args: Any, kwargs: Any) -> Any:
        weight, packed = self.weights[read.name]
        del kwargs  # the weight's own direction stands in `read`
        source = _product(read, of_source(args), weight)
        if packed is None and not has_pair(args):
            return source
        return Pair(source, _product(read, of_packed(args), weight if packed is None else packed))


def _product(read: WeightRead, args: Any, weight: Tensor) -> Tensor:
    if read.kind == "embedding":
        return F.embedding(args[0], weight)
    oriented = weight.mT if read.is_turned else weight
    if read.kind == "linear":
        return F.linear(args[0], oriented, *args[2:])
    return each_expert(args[0], oriented, args[2])


def _paired(source: Any, packed: Any) -> Any:
    """Two structures of values as one of pairs, where they hold tensors."""
    if isinstance(source, (tuple, list)) and not isinstance(source, torch.Size):
        return type(source)(_paired(a, b) for a, b in zip(source, packed, strict=True))
    return Pair(source, packed) if isinstance(source, Tensor) else source


def _own_memory(node: fx.Node, args: Any, kwargs: Any, values: Values) -> tuple[Any, Any]:
    """Arguments, with memory for each model where the node writes into what both share until now."""
    if not writes(node):
        return args, kwargs
    target: Any = node.target
    written: set[int] = set()
    for given, declared in zip(args, target._schema.arguments, strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write and isinstance(given, Tensor):
            written |= storages(given)
    if not written:
        return args, kwargs
    copies: dict[int, Any] = {}

    def split(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in written:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = storage.clone()
        empty: Any = torch.empty(0, dtype=value.dtype)
        made = empty.set_(copies[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())
        return Pair(value, made)

    for other, value in values.items():
        values[other] = pytree.tree_map(split, value, is_leaf=is_pair)
    return pytree.tree_map(split, (args, kwargs), is_leaf=is_pair)  # type: ignore[no-any-return]


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The position of the last node that reads each node; -1 where none does."""
    last = dict.fromkeys(nodes, -1)
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[used] = i
    return last
