"""`Program`: the one thing that passes take and return.

The one thing to know: a program never holds dense weights. Its graph runs on fake tensors, its weights are
names, shapes and uses; the data stays in the checkpoint until it is packed, one tensor at a time. What a pass
has packed already lies in ``packed``, and is stored as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from kbitc.formats.layout import Slot, plain_dtype, plain_slot
from kbitc.formats.packed import Packed
from kbitc.graph.context import Context, ReadTensor
from kbitc.graph.facts import Fact
from kbitc.graph.module_classes import ByClass
from kbitc.graph.plan import Plan

T = TypeVar("T")


class Stage(IntEnum):
    """How far a program has come; passes declare what they need and what they give."""

    CAPTURED = 0
    CANONICAL = 1
    PLANNED = 2
    PACKED = 3


# The canonical forms. After `canonicalize` every matmul with a weight, every look-up in a weight and
# every grouped matmul over experts is one call of one of these three, and of nothing else.


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
    matrix: tuple[int, ...] | None = None,
) -> Tensor:
    """``x @ weight.T + bias``; ``x``: (..., in), ``weight``: (out, in), or (in, out) if transposed.

    The weight is taken in the dtype of ``x``, and as the ``matrix`` that its shape is a view of.
    """
    oriented = as_matrix(weight, matrix, is_transposed=is_transposed)
    return torch.nn.functional.linear(x, oriented.to(x.dtype), bias)


def as_matrix(weight: Tensor, matrix: tuple[int, ...] | None, *, is_transposed: bool) -> Tensor:
    """A stored weight with its input dimension last.

    Args:
        weight: of any shape.
        matrix: ``(*lead, rows, in)`` that it is a view of, or ``(*lead, in, rows)``; None for its own.
        is_transposed: which of the two.
    """
    whole = weight if matrix is None else weight.reshape(matrix)
    return whole.mT if is_transposed else whole


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ``ids`` of ``weight``: (vocabulary, features)."""
    return torch.nn.functional.embedding(ids, weight)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    is_transposed: bool = False,
    matrix: tuple[int, ...] | None = None,
) -> Tensor:
    """Rows of ``x`` (tokens, in), sorted by expert, times their expert's weight (experts, out, in).

    ``offsets``: (experts,) cumulative token counts. With ``is_transposed`` weight is (experts, in, out).
    """
    stacked = as_matrix(weight, matrix, is_transposed=not is_transposed)
    return torch.nn.functional.grouped_mm(x, stacked.to(x.dtype), offs=offsets)


CANONICAL = {linear: "linear", embedding: "embedding", grouped_linear: "grouped_linear"}


@dataclass(frozen=True)
class Use:
    """One place that reads a weight: of the graph, or a module whose class says so and that no graph shows.

    Attributes:
        node: name of the canonical graph node; "" for a module's.
        kind: "linear", "embedding" or "grouped_linear".
        feeds_output: only views and arithmetic with constants stand between this use and an output.
        module: the module's name, where there is no node.
    """

    node: str
    kind: str
    feeds_output: bool = False
    module: str = ""

    @property
    def place(self) -> str:
        """How reports call it."""
        return self.node or f"module {self.module}"


@dataclass(frozen=True)
class Weight:
    """A weight that can be packed: one decision, however many modules share it.

    Attributes:
        name: the parameter's first name in the model, and its name in plans and artifacts.
        shape: as the model has it.
        dtype: of the source.
        uses: every place that reads it.
        aliases: other names of the same (tied) parameter.
        is_transposed: stored as (..., in, out): blocks run along the dimension before the last.
        view_of: the matrix, or batch of matrices, that its shape is a view of: the kernel (out, channels,
            3, 3) of a convolution over patches is one of (out, channels * 9). None where it is its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    uses: tuple[Use, ...] = ()
    aliases: tuple[str, ...] = ()
    is_transposed: bool = False
    view_of: tuple[int, ...] | None = None

    @property
    def matrix(self) -> tuple[int, ...]:
        """Its shape as a matrix or a batch of them, as it is stored."""
        return self.view_of or self.shape

    @property
    def in_features(self) -> int:
        """Length of the dimension that blocks run along."""
        return self.matrix[-2] if self.is_transposed else self.matrix[-1]

    @property
    def rows(self) -> int:
        """Number of rows of ``in_features`` weights, experts included."""
        return self.numel // self.in_features

    @property
    def oriented_shape(self) -> tuple[int, ...]:
        """``(*lead, rows, in_features)``: the shape with the input dimension last."""
        size = self.matrix
        return (*size[:-2], size[-1], size[-2]) if self.is_transposed else size

    def oriented(self, data: Tensor) -> Tensor:
        """Its data, as the model has it, with the input dimension last."""
        return as_matrix(data, self.view_of, is_transposed=self.is_transposed)

    def turned_back(self, data: Tensor) -> Tensor:
        """What :meth:`oriented` gave, as the model has it."""
        return (data.mT if self.is_transposed else data).reshape(self.shape)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return int(torch.Size(self.shape).numel())

    @property
    def is_head(self) -> bool:
        """True when a linear use of this weight ends in the graph's output: it gives the logits."""
        return any(use.feeds_output for use in self.uses)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds of use, sorted."""
        return tuple(sorted({use.kind for use in self.uses}))


@dataclass(frozen=True)
class Rest:
    """A parameter or buffer that is not packed, and why.

    Attributes:
        name: first name in the model.
        shape: as the model has it.
        dtype: of the source.
        reason: one clause for the report.
        is_matmul: True when it *is* the weight of a matmul, so that ``--strict`` must fail.
        is_parameter: False for a persistent buffer.
        aliases: other names of the same tensor.
        is_wide: stays at 32 bits, where the source has them: a buffer, or what the model computes in float32.
        is_summed: its rows meet others in sums, as those of a matmul do, see
            `kbitc.formats.layout.plain_dtype`.
        stored: what it is stored in; None as long as nobody looked: 16 bits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str
    is_matmul: bool = False
    is_parameter: bool = True
    aliases: tuple[str, ...] = ()
    is_wide: bool = False
    is_summed: bool = False
    stored: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def description(self) -> str:
        """The reason, and that a float is kept at more than 16 bits where it is."""
        return f"{self.reason}; kept at 32 bits" if self.is_kept_wide else self.reason

    @property
    def is_kept_wide(self) -> bool:
        """Whether it is a float that is stored at more than 16 bits."""
        return self.slot.dtype.is_floating_point and self.slot.dtype.itemsize > 2

    @property
    def slot(self) -> Slot:
        """Room for it in an artifact."""
        return plain_slot(self.dtype, self.shape) if self.stored is None else Slot(self.stored, self.shape)


Changes: TypeAlias = Mapping[str, Callable[[Tensor, ReadTensor], Tensor]]
"""Tensors by name that a pass stores otherwise than it found them: ``change(tensor, read)`` is stored."""


def changed_read(read: ReadTensor, changes: Changes) -> ReadTensor:
    """``read``, with some tensors changed after they are read."""

    def read_changed(name: str) -> Tensor:
        tensor = read(name)
        return changes[name](tensor, read) if name in changes else tensor

    return read_changed


@dataclass(frozen=True)
class Program:
    """A captured model on its way through the passes.

    Attributes:
        graph: FX graph; parameters and buffers are placeholders or get_attr nodes on fake tensors.
        parameters: graph node name to parameter or buffer name, for every lifted tensor.
        weights: packable weights by name, in the model's order (filled by ``canonicalize``).
        rest: everything else that is stored, by name, in the model's order.
        facts: what passes found out; :meth:`get`, :meth:`known` and :meth:`with_fact` are typed.
        plan: a spec for each weight, once planned.
        stage: how far the program has come.
        history: names of the passes that have run.
        context: the source's data, what to measure on, and who hears of progress.
        changes: what passes changed of the source's tensors, oldest first; ``read`` applies them.
        packed: weights that a pass has packed already, under their specs in the plan.
        by_class: what modules' classes say of parameters, for those that the graph does not read.
        untraced: why there is no graph, a clause; "" where there is one. Without, ``graph`` is empty and
            every weight is one of ``by_class``.
    """

    graph: fx.GraphModule
    parameters: Mapping[str, str]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    rest: Mapping[str, Rest] = field(default_factory=dict)
    facts: Mapping[Fact[Any], object] = field(default_factory=dict)
    plan: Plan | None = None
    stage: Stage = Stage.CAPTURED
    history: tuple[str, ...] = ()
    context: Context = field(default_factory=Context)
    changes: tuple[Changes, ...] = ()
    packed: Mapping[str, Packed] = field(default_factory=dict)
    by_class: ByClass = field(default_factory=dict)
    untraced: str = ""

    @property
    def parameter_count(self) -> int:
        """Parameters of the source model, tied ones counted once: the divisor of bits_per_param."""
        packed = sum(weight.numel for weight in self.weights.values())
        return packed + sum(rest.numel for rest in self.rest.values() if rest.is_parameter)

    @property
    def read(self) -> ReadTensor | None:
        """Reads one tensor's data as it is to be stored; None without a source."""
        return None if self.context.read is None else self.as_stored(self.context.read)

    def with_changes(self, changes: Changes) -> Program:
        """A copy that stores some tensors otherwise than it found them."""
        changed = replace(self, changes=(*self.changes, changes))
        return changed.with_stored_dtypes(name for name in changes if name in self.rest)

    def with_stored_dtypes(self, names: Iterable[str]) -> Program:
        """A copy that knows what tensors of ``rest`` are stored in; floats of 32 bits are read for it."""
        if self.read is None:
            return self
        rest = {name: self._with_stored_dtype(self.rest[name], self.read) for name in names}
        return replace(self, rest={**self.rest, **rest})

    def _with_stored_dtype(self, rest: Rest, read: ReadTensor) -> Rest:
        source = self.context.dtypes.get(rest.name, rest.dtype)
        if not source.is_floating_point:
            return rest
        if source.itemsize <= 2:
            return replace(rest, stored=self.context.dtypes.get(rest.name))
        # At 32 bits in a source of 16: somebody wanted them.
        is_wide = rest.is_wide or source.itemsize > rest.dtype.itemsize
        return replace(rest, stored=plain_dtype(read(rest.name), is_wide=is_wide, is_summed=rest.is_summed))

    def apart(self) -> Program:
        """What is needed to read, price and pack single weights, here or in another process.

        The facts that say something of each weight, the plan, and the reader with all changes; no graph, no
        calibration, and nothing that is packed already.
        """
        facts = {fact: known for fact, known in self.facts.items() if isinstance(known, Mapping)}
        context = Context(read=self.context.read, dtypes=self.context.dtypes)
        empty = fx.Graph()
        empty.output(())
        graph = fx.GraphModule(nn.Module(), empty)
        return replace(self, graph=graph, parameters={}, facts=facts, context=context, packed={}, by_class={})

    def as_stored(self, read: ReadTensor) -> ReadTensor:
        """Another reader of the same source, with all changes applied."""
        return functools.reduce(changed_read, self.changes, read)

    def is_changed(self, name: str) -> bool:
        """Whether a tensor is stored otherwise than the source has it."""
        return any(name in changes for changes in self.changes)

    def with_packed(self, name: str, packed: Packed) -> Program:
        """A copy that holds one more packed weight, to be stored as it is.

        Args:
            name: of the weight, whose spec in the plan ``packed`` must have.
            packed: of its data with the input dimension last, `Weight.oriented_shape`.
        """
        return replace(self, packed={**self.packed, name: packed})

    def get(self, fact: Fact[T]) -> T | None:
        """What is known of a fact; None if no pass has found it out."""
        return cast("T | None", self.facts.get(fact))

    def known(self, fact: Fact[T]) -> T:
        """The same of a fact that must be there, since the pass requires it."""
        return cast("T", self.facts[fact])

    def with_fact(self, fact: Fact[T], value: T) -> Program:
        """A copy that knows one more fact."""
        return replace(self, facts={**self.facts, fact: value})
