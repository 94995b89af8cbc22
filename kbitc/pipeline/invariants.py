"""What must hold after every pass, whatever the pass does.

The one thing to know: each check is a function of the programs before and after, and answers with
what the pass did wrong, or None. `CHEAP` run always; `EXPENSIVE` when a `PassManager` is told to check.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from kbitc.formats.layout import SCALE_MAP, SHARED, shared_codebooks
from kbitc.formats.packed import Packed
from kbitc.graph.program import CANONICAL, Program, Rest, Stage, Weight, grouped_linear
from kbitc.graph.text import value_text


def first_fault(before: Program, after: Program, *, is_checked: bool = False) -> str | None:
    """What a pass broke, in a clause that goes on from its name; None if nothing.

    Args:
        before: what it was given.
        after: what it returned.
        is_checked: also run the checks that take as long as a pass.
    """
    checks = (*CHEAP, *EXPENSIVE) if is_checked else CHEAP
    return next((fault for check in checks if (fault := check(before, after)) is not None), None)


def broken_graph(before: Program, after: Program) -> str | None:
    """The graph is well formed. Leaves it recompiled."""
    try:
        after.graph.graph.lint()
    except RuntimeError as error:
        return f"left a broken graph: {error}"
    if after.graph is not before.graph:
        after.graph.recompile()
    return None


def lost_tensor(before: Program, after: Program) -> str | None:
    """Every stored tensor is still there: a weight or among the rest, under one name."""
    had, has = {*before.weights, *before.rest}, {*after.weights, *after.rest}
    if had != has:
        lost, new = sorted(had - has), sorted(has - had)
        return f"lost the tensor '{lost[0]}'" if lost else f"made up a tensor '{new[0]}'"
    both = sorted({*after.weights} & {*after.rest})
    if both:
        return f"'{both[0]}' is a weight and also among the rest"
    stored: dict[str, Weight | Rest] = {**after.weights, **after.rest}
    renamed = next((key for key, tensor in stored.items() if tensor.name != key), None)
    if renamed is not None:
        return f"keeps a tensor under '{renamed}' that calls itself by another name"
    names = Counter(name for tensor in stored.values() for name in (tensor.name, *tensor.aliases))
    repeated = next((name for name, count in names.items() if count > 1), None)
    if repeated is not None:
        return f"'{repeated}' names two tensors: a tied tensor is one entry, its other names are aliases"
    return None


def lost_input(_: Program, after: Program) -> str | None:
    """Every lifted tensor is still an input of the graph."""
    nodes = {node.name for node in after.graph.graph.nodes}
    missing = sorted(set(after.parameters) - nodes)
    if missing:
        return f"removed the graph input '{missing[0]}' of '{after.parameters[missing[0]]}'"
    return None


def wrong_use(_: Program, after: Program) -> str | None:
    """What a weight calls its use is a canonical call of that kind, until the graph is lowered."""
    if after.stage >= Stage.PACKED:
        return None
    nodes = {node.name: node for node in after.graph.graph.nodes}
    for weight in after.weights.values():
        for use in (use for use in weight.uses if not use.module):
            node = nodes.get(use.node)
            if node is None or CANONICAL.get(cast("Any", node.target)) != use.kind:
                return f"'{weight.name}' says that '{use.node}' is its {use.kind}, which it is not"
    return None


def changed_interface(before: Program, after: Program) -> str | None:
    """The model's inputs and outputs are as many and of the same dtypes and shapes as before."""
    for what, values in (("input", _input_values), ("output", _output_values)):
        had, has = values(before), values(after)
        if len(had) != len(has):
            return f"left the model {len(has)} {what}s, which had {len(had)}"
        for i, (old, new) in enumerate(zip(had, has, strict=True)):
            if None not in (old, new) and old != new:
                return f"changed {what} {i} of the model from {old} to {new}"
    return None


def dropped_fact(before: Program, after: Program) -> str | None:
    """Facts are added to, never taken away: a later pass may have asked for them."""
    dropped = sorted(fact.name for fact in before.facts.keys() - after.facts.keys())
    return f"dropped the fact '{dropped[0]}'; use program.with_fact to add to them" if dropped else None


def uneven_plan(_: Program, after: Program) -> str | None:
    """Once planned, every weight has exactly one choice, under its first name."""
    if after.stage < Stage.PLANNED or (after.plan is None and not after.weights):
        return None
    if after.plan is None:
        return f"gives stage {after.stage.name}, but left no plan"
    missing = next((name for name in after.weights if name not in after.plan.weights), None)
    if missing is not None:
        return f"left the weight '{missing}' without a spec in the plan"
    first = {alias: weight.name for weight in after.weights.values() for alias in weight.aliases}
    for name in after.plan.weights:
        if name in first:
            return f"plans '{name}', which is tied: it is planned once, as '{first[name]}'"
        if name in after.rest:
            return f"plans '{name}', which stays at 16 bits: {after.rest[name].reason}"
        if name not in after.weights:
            return f"plans '{name}', which is no weight of the model"
    return None


def wrong_packing(before: Program, after: Program) -> str | None:
    """What is packed already has the plan's spec and the weight's shape, and is of the weight as it is."""
    planned = {} if after.plan is None else after.plan.weights
    for name, packed in after.packed.items():
        if name not in after.weights:
            return f"packed '{name}', which is no weight of the model"
        if name not in planned:
            return f"packed '{name}', which has no spec yet; first run a pass that plans"
        if packed.spec != planned[name].spec:
            return f"left '{name}' packed as {packed.spec}, where the plan says {planned[name].spec}"
        if packed.shape != after.weights[name].oriented_shape:
            return f"packed '{name}' as {packed.shape}, which is {after.weights[name].oriented_shape}"
        is_stale = any(name in changes for changes in after.changes[len(before.changes) :])
        if is_stale and packed is before.packed.get(name):
            return f"changed '{name}' after it was packed; pack it again, or change it before"
        if before.packed.get(name) is not packed and not _has_shared_codebooks(packed):
            return (
                f"packed '{name}' with a codebook of its own, which {packed.spec} shares with other weights"
            )
    return None


def _has_shared_codebooks(packed: Packed) -> bool:
    """Whether the codebooks that do not stand with the weight are those that stand for all."""
    shared = shared_codebooks([packed.spec])
    is_common = packed.spec.is_fitted or torch.equal(
        packed.codebook.cpu(), shared[SHARED + packed.spec.codebook_name]
    )
    scales = packed.scale_codebook
    return is_common and (scales is None or torch.equal(scales.cpu(), shared[SCALE_MAP]))


def wrong_values(_: Program, after: Program) -> str | None:
    """The dtypes and shapes that nodes record are those that the graph computes."""
    inputs = [node.meta.get("val") for node in after.graph.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode([value for value in inputs if value is not None])
    if mode is None or any(value is None for value in inputs):
        return None  # a graph that was not captured on fake tensors records nothing to compare
    replay = _Replay(after.graph)
    try:
        with mode:
            replay.run(*inputs)
    except _Unrunnable as error:
        return f"left a graph that cannot run: {error}"
    return replay.fault


_SYMBOL = re.compile(r"\bu\d+\b")


class _Unrunnable(Exception):
    """A node raised; the message names it."""


class _Replay(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the first node whose recorded value differs."""

    fault: str | None = None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not grouped_linear:
            return super().call_function(target, args, kwargs)
        # torch's own shape rule for a grouped matmul refuses every dtype but bfloat16.
        x, weight = args[:2]
        rows = (kwargs.get("matrix") or weight.shape)[-1 if kwargs.get("is_transposed") else -2]
        return x.new_empty(x.shape[0], rows)

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            raise _Unrunnable(f"'{n.name}': {type(error).__name__}: {error}") from error
        if self.fault is None and n.op == "call_function" and "val" in n.meta:
            recorded, computed = value_text(n.meta["val"]), value_text(value)
            # A size that depends on data is a new symbol each time that it is computed.
            if _SYMBOL.sub("u", recorded) != _SYMBOL.sub("u", computed):
                self.fault = f"recorded {recorded} as the value of '{n.name}', which computes {computed}"
        return value


def _input_values(program: Program) -> list[str | None]:
    nodes = program.graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder" and node.name not in program.parameters]
    return [_recorded(node) for node in inputs]


def _output_values(program: Program) -> list[str | None]:
    ends = [node for node in program.graph.graph.nodes if node.op == "output"]
    return [_recorded(value) for end in ends for value in pytree.tree_leaves(end.args)]


def _recorded(value: object) -> str | None:
    """Dtype and shape of a node's value; None for what is no node or records none."""
    if isinstance(value, fx.Node) and "val" in value.meta:
        return value_text(value.meta["val"])
    return None


CHEAP = (
    broken_graph,
    lost_tensor,
    lost_input,
    wrong_use,
    changed_interface,
    dropped_fact,
    uneven_plan,
    wrong_packing,
)
EXPENSIVE = (wrong_values,)
