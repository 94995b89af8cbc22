"""Modules in memory: planned, packed, given back as a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from kbitc.artifact.pack import packed_tensors
from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.checks import check_request
from kbitc.compiler.request import Request, pipeline_of, unmeasured
from kbitc.compiler.source_path import Capture, Inputs, run_passes
from kbitc.compiler.transform_trials import settled
from kbitc.graph.program import Program
from kbitc.pipeline.manager import PassManager
from kbitc.tensor.kbit_tensor import KbitTensor


def plan_module(
    module: nn.Module, request: Request, captured: Capture | None = None, example_inputs: Inputs = None
) -> Program:
    """The planned program of a module in memory, which is not touched.

    Args:
        module: with plain parameters.
        request: how to choose the specs.
        captured: makes the program that the passes start from, of the module as an open checkpoint; by
            default the whole module's, traced on the inputs.
        example_inputs: the user's, to trace and measure on; else such that fit the module.
    """
    pipeline_of(request)  # what is wrong with the request is said before the module is looked at
    with open_checkpoint(module) as checkpoint:
        request, _ = settled(request, checkpoint, captured=captured, example_inputs=example_inputs)
        run = run_passes(
            checkpoint,
            PassManager(pipeline_of(request)),
            request.calibrate,
            is_measured=request.wants_moments(),
            most=request.most_inputs,
            without=lambda: unmeasured(request),
            captured=captured,
            example_inputs=example_inputs,
        )
    check_request(run.program, request)
    return run.program


def packed_weights(module: nn.Module, program: Program) -> Iterator[tuple[str, KbitTensor]]:
    """Every weight that the plan packs, by its first name, made from the module's parameter in turn."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return packed_tensors(program, program.as_stored(lambda name: parameters[name].detach()))


def with_packed(module: nn.Module, program: Program, packed: Iterable[tuple[str, KbitTensor]]) -> nn.Module:
    """A deep copy of a module with packed parameters, tied ones too, in place of dense ones.

    Args:
        module: not touched.
        program: planned; what it changed of other parameters is in the copy, which has them at the source's
            dtype.
        packed: weights by their first names.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # deepcopy looks here first: the copy gets what is stored and never copies the dense weight.
    memo: dict[int, Any] = {}
    for name, weight in packed:
        memo[id(parameters[name])] = nn.Parameter(weight, requires_grad=False)
    for part in module.modules():
        # Tensors that a module computes of its parameters: deepcopy refuses those that have a history.
        made = [value for value in vars(part).values() if isinstance(value, Tensor) and not value.is_leaf]
        memo.update((id(value), value.detach()) for value in made)
    read = program.as_stored(lambda name: parameters[name].detach())
    for name, source in parameters.items():
        if id(source) not in memo and program.is_changed(name):
            memo[id(source)] = nn.Parameter(read(name), requires_grad=source.requires_grad)
    return copy.deepcopy(module, memo)
