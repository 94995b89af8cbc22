"""Read packed weights in the graph of a planned model: each use by a dequantization of its own.

before:  linear(x, W, b)        embedding(ids, W)         grouped_linear(x, W, n)
after:   linear(x, D, b)        embedding(ids, D)         grouped_linear(x, D, n)
         D = kbit.dequantize(W.planes, W.scales, codebook, ..., dtype of W): (..., rows, in_features)

The graph's input W becomes one input for each tensor that packing stores, under the names of the
artifact; codebooks that weights share are one input. It needs no weights: shapes follow from the plan.
Calls in no canonical form (the graph of another capture of the same model) read D as W is stored.
``fuse_dequantize`` then makes one ``kbit`` call of each pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from kbitc.formats.layout import Slot, operand_slots
from kbitc.formats.packed import TENSOR_FIELDS
from kbitc.formats.spec import Spec
from kbitc.graph.program import CANONICAL, Program, Stage, Weight
from kbitc.graph.rewriting import call, copy_of
from kbitc.graph.weight_reads import INT8_INPUTS, value_of


@dataclass(frozen=True)
class InsertDequantize:
    """Puts the plan into the graph: what is packed is read by ``kbit.dequantize``."""

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PACKED

    def run(self, program: Program) -> Program:
        """The same computation on packed tensors; weights that the plan leaves alone stay as they are."""
        assert program.plan is not None
        graph = copy_of(program)
        inputs = _Inputs(graph)
        parameters: dict[str, str] = {}
        for node in list(graph.nodes):
            name = program.parameters.get(node.name)
            if name is None:
                continue
            if name not in program.weights or program.plan.weights[name].spec.is_left_alone:
                parameters[node.name] = name
                continue
            weight, spec = program.weights[name], program.plan.weights[name].spec
            _read_packed(graph, node, weight, spec, inputs.of(node, weight, spec))
        parameters |= {node.name: stored for stored, node in inputs.made.items()}
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module, parameters=parameters, stage=Stage.PACKED)


class _Inputs:
    """The inputs of a graph that hold what is packed, each stored tensor once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[str, fx.Node] = {}

    def of(self, dense: fx.Node, weight: Weight, spec: Spec) -> list[fx.Node | int | None]:
        """The operands of a ``kbit`` op for a weight whose dense input is ``dense``."""
        slots = operand_slots(weight.name, spec, weight.oriented_shape[:-1], weight.in_features)
        tensors = [self._input(dense, *slots[field]) if field in slots else None for field in TENSOR_FIELDS]
        return [*tensors, weight.in_features, spec.bits, spec.block]

    def _input(self, dense: fx.Node, stored: str, slot: Slot) -> fx.Node:
        if stored not in self.made:
            value = value_of(dense)
            with self.graph.inserting_before(dense):
                node = self.graph.placeholder(re.sub(r"\W", "_", f"p_{stored}"))
            node.target = node.name  # unique, as an argument must be
            # Fake, as every value of a captured graph: nothing is allocated.
            node.meta["val"] = value.new_empty(slot.shape, dtype=slot.dtype)
            self.made[stored] = node
        return self.made[stored]


def _read_packed(
    graph: fx.Graph, dense: fx.Node, weight: Weight, spec: Spec, operands: list[fx.Node | int | None]
) -> None:
    dequantize = torch.ops.kbit.dequantize.default
    for use in list(dense.users):
        with graph.inserting_before(use):
            unpacked = graph.call_function(dequantize, (*operands, weight.dtype))
        unpacked.meta = {**use.meta, "val": value_of(dense).new_empty(weight.oriented_shape)}
        unpacked.meta[INT8_INPUTS] = spec.has_int8_inputs
        # What is dequantized has its output features first, however the source stores it.
        if use.target not in CANONICAL:
            with graph.inserting_before(use):
                if weight.is_transposed:
                    unpacked = call(graph, unpacked, torch.ops.aten.transpose.int, unpacked, -2, -1)
                if weight.view_of is not None:
                    shape = list(weight.shape)
                    unpacked = call(graph, unpacked, torch.ops.aten.reshape.default, unpacked, shape)
        use.replace_input_with(dense, unpacked)
        if use.target in CANONICAL:
            is_turned = bool(use.kwargs.get("is_transposed", False)) ^ weight.is_transposed
            rest = {key: use.kwargs[key] for key in use.kwargs if key not in ("is_transposed", "matrix")}
            use.kwargs = rest | ({"is_transposed": True} if is_turned else {})
    graph.erase_node(dense)


PASS = InsertDequantize
