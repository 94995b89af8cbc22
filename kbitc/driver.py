"""The compiler from end to end: read, capture, passes, pack, artifact.

The one thing to know: there is one path. A module in memory and a folder of 100 GB go through the
same statements; the module only ends as packed parameters in a copy of itself instead of in a file.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kbitc import outliers, pack, pipeline, tradeoff
from kbitc.artifact import Writer, check_target
from kbitc.capture import capture
from kbitc.checkpoint import Checkpoint, open_checkpoint
from kbitc.checkpoint.folder_checks import read_json
from kbitc.documents import documents, weight_entry
from kbitc.errors import BudgetError, UsageError
from kbitc.fusions import Fired, records
from kbitc.knapsack import Solution
from kbitc.passes import allocate_bits, score_sensitivity
from kbitc.passes.allocate_bits import allocate
from kbitc.passes.insert_dequantize import InsertDequantize
from kbitc.passes.measure_moments import TEXT_FACT
from kbitc.passes_page import graph_section
from kbitc.pipeline import Pass, PassManager, Step, lowering_pipeline
from kbitc.plan import Choice
from kbitc.program import Program
from kbitc.request import Event, Request, calibrator_of, equipped, pipeline_of
from kbitc.scores import Scores
from kbitc.tensor import KbitTensor, quantize
from kbitc.version import VERSION

Manage = Callable[[Sequence[Pass]], PassManager]
"""Makes the manager of a list of passes: ``PassManager``, or one that also prints or observes."""


def lower(program: Program) -> Program:
    """The graph of a planned program on packed weights, fused and cleaned up; needs no weights."""
    return PassManager([InsertDequantize(), *lowering_pipeline()]).run(program)


@dataclass(frozen=True)
class Result:
    """What a compilation did.

    Attributes:
        source: what was compiled, as the user named it.
        program: planned.
        payload_bytes: bytes of all stored tensors.
        source_bytes: bytes of the same tensors in the source.
        out: the artifact; None after a dry run.
        fusions: what fusion and clean-up passes did and left, by the pass.
        seconds: wall time by phase.
    """

    source: str
    program: Program
    payload_bytes: int
    source_bytes: int
    out: Path | None
    fusions: Mapping[str, Fired] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits_per_param(self) -> float:
        """Stored bits per parameter, tied ones counted once."""
        return 8 * self.payload_bytes / self.program.parameter_count

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output of compile."""
        program = self.program
        assert program.plan is not None
        return {
            "source": self.source,
            "out": None if self.out is None else str(self.out),
            "parameters": program.parameter_count,
            "bytes": self.payload_bytes,
            "source_bytes": self.source_bytes,
            "bits_per_param": self.bits_per_param,
            "seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "weights": program.plan.to_json()["weights"],
            "left_alone": {name: rest.reason for name, rest in program.rest.items()},
            "fusions": {name: record.to_json() for name, record in self.fusions.items()},
        }


def compile_to(
    source: str | Path | nn.Module,
    out: Path,
    request: Request,
    *,
    is_forced: bool = False,
    is_resumed: bool = False,
    is_dry: bool = False,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    on_event: Event = lambda *_: None,
    manage: Manage = PassManager,
) -> Result:
    """Compile a model into an artifact folder.

    Args:
        source: local folder, GGUF file, hub id, "demo", or a module in memory.
        out: folder to write.
        request: how to choose the specs.
        is_forced: replace an existing artifact.
        is_resumed: continue an interrupted run.
        is_dry: plan and report, write nothing.
        example_inputs: for a module that transformers does not know.
        on_event: progress.
        manage: makes the manager that runs the passes.

    Raises:
        UsageError: bad arguments, target, passes, plan or weight.
        SourceError: the source cannot be read or captured.
        BudgetError: no plan meets the budget.
    """
    passes = pipeline_of(request)
    manage(passes)  # what is wrong with the request is said before the model is opened
    if not is_dry:
        check_target(out, is_forced=is_forced)
    seconds: dict[str, float] = {}
    with _timed(seconds, "open"):
        opened = open_checkpoint(source)
    with opened as checkpoint:
        calibrator = calibrator_of(request, checkpoint, on_event)
        manager = manage(equipped(passes, request, calibrator, on_event))
        on_event("capture", 0, 0)
        with _timed(seconds, "capture"):
            skeleton = checkpoint.skeleton()
            captured = capture(skeleton, example_inputs, read=checkpoint.read)
        on_event("plan", 0, 0)
        with _timed(seconds, "plan"):
            program = manager.run(captured)
        _check_request(program, request)
        with _timed(seconds, "lower"):
            fusions = records(lower(program))
        source_bytes = sum(info.nbytes for info in checkpoint.tensors().values())
        size = pack.payload_bytes(program)
        target = None if is_dry else out
        result = Result(checkpoint.label, program, size, source_bytes, target, fusions, seconds)
        if is_dry:
            return result
        with _timed(seconds, "pack"), _writer(checkpoint, program, out, is_forced, is_resumed) as writer:
            pack.pack_to(program, checkpoint.read, writer, _counter(on_event, source_bytes))
            checkpoint.save_companions(writer.partial)
            writer.commit(_documents(result, writer, captured))
    return result


class _timed:  # noqa: N801  # reads as a function
    """Adds the wall time of a block to ``seconds[phase]``."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.phase] = time.perf_counter() - self.start


def _counter(on_event: Event, total: int) -> pack.Progress:
    done = 0

    def progress(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_event(name, done, total)

    return progress


def _writer(
    checkpoint: Checkpoint,
    program: Program,
    out: Path,
    is_forced: bool,
    is_resumed: bool,
) -> Writer:
    assert program.plan is not None
    identity = {
        "source": checkpoint.fingerprint(),
        "specs": {name: str(choice.spec) for name, choice in program.plan.weights.items()},
        "kbitc": VERSION,
        "torch": torch.__version__,
        "calibration": program.facts.get(TEXT_FACT),
        "changed": sorted(name for changes in program.changes for name in changes),
    }
    return Writer(out, pack.slots(program), identity, is_forced=is_forced, is_resumed=is_resumed)


def _check_request(program: Program, request: Request) -> None:
    """A plan is what was asked for, whichever passes made and changed it."""
    if request.is_strict:
        _check_strict(program)
    size = pack.payload_bytes(program)
    if request.bits is not None and size > request.bits * program.parameter_count / 8:
        raise BudgetError(
            f"--bits {request.bits:g}: the passes {list(program.history)} ended with a plan of "
            f"{8 * size / program.parameter_count:.4f} stored bits per parameter; a pass that adds bits "
            "needs a planner with a smaller budget before it"
        )


def _check_strict(program: Program) -> None:
    left = [f"{name} ({rest.reason})" for name, rest in program.rest.items() if rest.is_matmul]
    assert program.plan is not None
    left += [
        f"{name} (spec fp16)" for name, choice in program.plan.weights.items() if choice.spec.is_left_alone
    ]
    if left:
        raise UsageError(
            f"--strict: {len(left)} matmul weights would be left unquantized, the first is {left[0]}; "
            "run without --strict to accept that, or see 'kbitc inspect'"
        )


def _documents(result: Result, writer: Writer, captured: Program) -> dict[str, str]:
    """The text files of the artifact: plan, config with its quantization entry, scores, report."""
    program = result.program
    assert program.plan is not None
    weights = {}
    for name, choice in program.plan.weights.items():
        weight = program.weights[name]
        nbytes = sum(slot.nbytes for slot in writer.slots[name].values())
        measured = Choice(choice.spec, choice.reason, writer.done[name]["error"], 8 * nbytes / weight.numel)
        weights[name] = weight_entry(
            measured, weight.shape, weight.dtype, weight.aliases, is_transposed=weight.is_transposed
        )
        found = outliers.of_weight(program.facts, name)
        if found is not None:
            kept = choice.spec.outlier_count(weight.in_features)
            weights[name]["outlier_features"] = found.to_json() | {"kept": kept}
    facts = {
        "source": {"name": Path(result.source).name, "sha256": pack.source_hash(writer.done)},
        "budget": program.plan.budget,
        "calibration": program.facts.get(TEXT_FACT),
        "predicted": _prediction(program),
        "passes": [
            {
                "name": step.name,
                "nodes_before": step.nodes_before,
                "nodes_after": step.nodes_after,
                "changes": str(step),
            }
            for step in cast("tuple[Step, ...]", program.facts.get(pipeline.FACT, ()))
        ],
        "parameters": program.parameter_count,
        "bytes": result.payload_bytes,
        "source_bytes": result.source_bytes,
        "fusions": {name: record.to_json() for name, record in result.fusions.items()},
    }
    left = {
        name: {"reason": rest.reason, "shape": list(rest.shape), "aliases": list(rest.aliases)}
        for name, rest in program.rest.items()
    }
    config = writer.partial / "config.json"
    return documents(
        facts,
        weights,
        left,
        writer.checksums,
        read_json(config) if config.exists() else None,
        _scores(program),
        [graph_section(captured, program)],
    )


def _scores(program: Program) -> Scores | None:
    scores = program.facts.get(score_sensitivity.FACT)
    return scores if isinstance(scores, Scores) else None


def _prediction(program: Program) -> dict[str, Any] | None:
    """What the score table says of the plan, whichever passes made it; None if it cannot say."""
    scores, solution = _scores(program), program.facts.get(allocate_bits.FACT)
    assert program.plan is not None
    if scores is None:
        return None
    specs = {name: choice.spec for name, choice in program.plan.weights.items()}
    found = tradeoff.priced(scores, specs)
    if found is None:
        return None
    cost = math.fsum(option.cost for option in found.values())
    # A bound on the allocator's answer says nothing of a plan that another pass changed.
    is_solved = isinstance(solution, Solution) and math.isclose(cost, solution.cost, rel_tol=1e-9)
    gap = solution.gap if isinstance(solution, Solution) and is_solved else None
    return {"cost": cost, "unit": scores.unit, "source": scores.source, "gap": gap}


def replan(folder: Path, bits: float, agree: str = "") -> dict[str, Any]:
    """A plan for another budget, from the score table of an artifact alone.

    Args:
        folder: an artifact that was compiled with ``--bits``, or a score table.
        bits: stored bits per parameter of the whole model.
        agree: weights that get one spec, see `Request`.

    Returns:
        The contents of a plan file for ``--plan``, with the predicted loss and its bound.

    Raises:
        UsageError: no score table there, or a budget out of range.
        BudgetError: no plan meets the budget.
    """
    Request(bits=bits, agree=agree)
    scores = Scores.open(folder)
    plan, solution = allocate(scores, bits, agree)
    stored = 8 * (solution.nbytes + scores.fixed) / scores.parameters
    return plan.to_json() | {
        "bits_per_param": stored,
        "predicted": {"cost": solution.cost, "unit": scores.unit, "gap": solution.gap},
    }


def compile_module(
    module: nn.Module,
    request: Request,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of ``module`` whose weights are packed; the module itself is not touched.

    Unpacked parameters are copied as they are, at the source's dtype.
    """
    program = plan_module(
        module, request, lambda source: capture(source.skeleton(), example_inputs, read=source.read)
    )
    return pack_module(module, program)


def plan_module(module: nn.Module, request: Request, captured: Callable[[Checkpoint], Program]) -> Program:
    """The planned program of a module in memory, which is not touched.

    Args:
        module: with plain parameters.
        request: how to choose the specs.
        captured: makes the program that the passes start from, of the module as an open checkpoint.
    """
    with open_checkpoint(module) as checkpoint:
        program = captured(checkpoint)
        calibrator = calibrator_of(request, checkpoint, lambda *_: None)
        program = PassManager(equipped(pipeline_of(request), request, calibrator)).run(program)
    _check_request(program, request)
    return program


def pack_module(module: nn.Module, program: Program) -> nn.Module:
    """Deep copy of a module with every planned parameter, tied ones too, replaced by its packed form."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # deepcopy looks here first: the copy gets what is stored and never copies the dense weight.
    memo: dict[int, Any] = {}
    for name, packed in packed_weights(module, program):
        memo[id(parameters[name])] = nn.Parameter(packed, requires_grad=False)
    read = program.as_stored(lambda name: parameters[name].detach())
    for name, source in parameters.items():
        if id(source) not in memo and program.is_changed(name):
            memo[id(source)] = nn.Parameter(read(name), requires_grad=source.requires_grad)
    return copy.deepcopy(module, memo)


def packed_weights(module: nn.Module, program: Program) -> Iterator[tuple[str, KbitTensor]]:
    """Every weight that the plan packs, by its first name, made from the module's parameter in turn."""
    assert program.plan is not None
    parameters = dict(module.named_parameters(remove_duplicate=False))
    read = program.as_stored(lambda name: parameters[name].detach())
    for name, choice in program.plan.weights.items():
        if not choice.spec.is_left_alone:
            is_transposed = program.weights[name].is_transposed
            options = pack.quantizer_of(program, name, choice.spec)
            yield name, quantize(read(name), choice.spec, is_transposed=is_transposed, name=name, **options)
