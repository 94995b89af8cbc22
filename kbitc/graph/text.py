"""A program as text, as the difference of two texts, and in DOT form.

The one thing to know: a node's line says all about it but its place, so that programs are compared
line by line: a node whose line is the same was left alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from kbitc.graph.program import CANONICAL, Program, Rest, Weight
from kbitc.graph.weight_reads import op_name

CONTEXT = 2
"""Unchanged lines around each change of a diff."""


def node_lines(program: Program) -> dict[str, str]:
    """Each node's line, by the node's name, in the graph's order."""
    return {node.name: _line(program, node) for node in program.graph.graph.nodes}


def program_text(program: Program) -> str:
    """The graph, the stored tensors with their plan, and the names of the facts."""
    return "\n".join([*_text_lines(program), ""])


def program_diff(before: Program, after: Program) -> str:
    """Unified difference of the two texts; empty if they are equal."""
    old, new = list(_text_lines(before)), list(_text_lines(after))
    return "\n".join(difflib.unified_diff(old, new, "before", "after", n=CONTEXT, lineterm=""))


def value_text(value: object) -> str:
    """Dtype and shape of what a node computes.

    >>> value_text((torch.zeros(2, 3), 7))
    '(float32[2, 3], int)'
    """
    if isinstance(value, Tensor):
        return f"{_written(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(value_text, value))})"
    return type(value).__name__


def program_dot(program: Program) -> str:
    """The graph in DOT form: calls and weights, without the shape arithmetic's constants."""
    lines = ["digraph kbitc {", "  rankdir=TB; node [fontname=monospace fontsize=10 shape=box];"]
    for node in program.graph.graph.nodes:
        parameter = program.parameters.get(node.name)
        if node.op == "call_function":
            kind = CANONICAL.get(node.target)
            label = kind or str(node.target).removeprefix("aten.")
            style = ' style=filled fillcolor="#cfe0ff"' if kind else ""
            lines.append(f'  "{node.name}" [label="{label}"{style}];')
        elif parameter is not None and node.users:
            lines.append(f'  "{node.name}" [label="{parameter}" shape=note];')
        elif node.op in ("placeholder", "output") and parameter is None:
            lines.append(f'  "{node.name}" [label="{node.op}: {node.name}" shape=oval];')
        else:
            continue
        lines.extend(f'  "{source.name}" -> "{node.name}";' for source in node.all_input_nodes)
    return "\n".join([*lines, "}", ""])


def _text_lines(program: Program) -> Iterator[str]:
    yield f"stage {program.stage.name}, after the passes {list(program.history)}"
    yield from node_lines(program).values()
    yield "weights:"
    yield from (f"  {_weight(program, weight)}" for weight in program.weights.values())
    yield "left at 16 bits:"
    yield from (f"  {_stored(rest)}: {rest.reason}" for rest in program.rest.values())
    yield "facts:"
    yield from (f"  {name}: {type(value).__name__}" for name, value in program.facts.items())


def _weight(program: Program, weight: Weight) -> str:
    choice = None if program.plan is None else program.plan.weights.get(weight.name)
    plan = "no spec yet" if choice is None else f"{choice.spec} ({choice.reason})"
    uses = ", ".join(f"{use.kind} {use.place}" for use in weight.uses)
    tied = f", tied: {', '.join(weight.aliases)}" if weight.aliases else ""
    return f"{_stored(weight)}, read by {uses}{tied}: {plan}"


def _stored(tensor: Weight | Rest) -> str:
    return f"{tensor.name} {_written(tensor.dtype)}{list(tensor.shape)}"


def _line(program: Program, node: fx.Node) -> str:
    operands = [_written(value) for value in node.args]
    operands += [f"{key}={_written(value)}" for key, value in node.kwargs.items()]
    if node.op == "output":
        return f"output {', '.join(operands)}"
    if node.op == "placeholder":
        parameter = program.parameters.get(node.name)
        made_by = "input" if parameter is None else f"stored {parameter}"
    elif node.op == "get_attr":
        made_by = f"constant {node.target}"
    else:
        made_by = f"{_called(node)}({', '.join(operands)})"
    value = f": {value_text(node.meta['val'])}" if "val" in node.meta else ""
    return f"{node.name}{value} = {made_by}"


def _called(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)  # with its overload, which op_name leaves out
    return op_name(node)


def _written(value: Any) -> str:
    """An operand as its line has it; nodes by name."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_written, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, str):
        return repr(value)
    return str(value).removeprefix("torch.")
