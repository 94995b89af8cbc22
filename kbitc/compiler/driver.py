"""The compiler from end to end: read, capture, passes, pack, artifact.

The one thing to know: there is one path. A module in memory and a folder of 100 GB go through the
same statements; the module only ends as packed parameters in a copy of itself instead of in a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.pack import pack_to, source_hash
from kbitc.artifact.plan_file import LeftAlone, PassEntry, PlanFile, Prediction, WeightEntry
from kbitc.artifact.reader import Artifact
from kbitc.artifact.stored import stored_tensors
from kbitc.artifact.writer import Writer
from kbitc.checkpoint import Checkpoint, open_checkpoint
from kbitc.checkpoint.tensor_digests import digest_of_tensor
from kbitc.compiler.checks import by_class_alone, check_request, skipped_passes, warn_untraced
from kbitc.compiler.documents import documents
from kbitc.compiler.lowering import lower
from kbitc.compiler.modules import packed_weights, plan_module, with_packed
from kbitc.compiler.request import Request, pipeline_of, unmeasured
from kbitc.compiler.source_path import Inputs, Manage, run_passes
from kbitc.compiler.transform_trials import Trial, settled
from kbitc.errors import out_of_memory
from kbitc.graph.context import Progress, silent
from kbitc.graph.program import Program
from kbitc.graph.stored import stored_bytes, stored_slots
from kbitc.pipeline.manager import STEPS, PassManager
from kbitc.pipeline.records import Fired, records
from kbitc.planning import tradeoff
from kbitc.planning.allocation import ALLOCATION
from kbitc.planning.target import Target, target_bytes
from kbitc.report.module_tree import graph_section
from kbitc.sensitivity.moments import CALIBRATION
from kbitc.sensitivity.outliers import OUTLIERS
from kbitc.sensitivity.score_table import SCORES
from kbitc.system.json_file import read_json
from kbitc.system.work import IN_PROCESS, Engine
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.version import VERSION


@dataclass(frozen=True)
class Result:
    """What a compilation did.

    Attributes:
        source: what was compiled, as the user named it.
        program: planned.
        payload_bytes: bytes of all stored tensors.
        source_bytes: bytes of the same tensors in the source.
        out: the artifact; None after a dry run.
        held_by: the other program that the plan is for; None for kbitc itself.
        fusions: what fusion and clean-up passes did and left, by the pass.
        seconds: wall time by phase.
        skipped: names of the passes that were left out, since the model could not be traced.
        trials: of passes that were made as far as held-out inputs gain by them.
        in_order: weights that this run packed in the order of the graph, in this process whatever the engine.
    """

    source: str
    program: Program
    payload_bytes: int
    source_bytes: int
    out: Path | None
    held_by: Target | None = None
    fusions: Mapping[str, Fired] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    in_order: tuple[str, ...] = ()

    @property
    def exported_bytes(self) -> int | None:
        """Of all tensors in the file of the program that the plan is for; None without."""
        return None if self.held_by is None else target_bytes(self.held_by, self.program)

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
            **self._exported_json(),
            "seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "weights": program.plan.to_json()["weights"],
            "left_alone": {name: rest.description for name, rest in program.rest.items()},
            "by_class": by_class_alone(program),
            "untraced": program.untraced or None,
            "skipped": list(self.skipped),
            "fusions": {name: record.to_json() for name, record in self.fusions.items()},
            "trials": [asdict(trial) for trial in self.trials],
            "in_order": list(self.in_order),
        }

    def _exported_json(self) -> dict[str, Any]:
        nbytes = self.exported_bytes
        if nbytes is None or self.held_by is None:
            return {}
        bits = 8 * nbytes / self.program.parameter_count
        return {"for": {"target": self.held_by.name, "bytes": nbytes, "bits_per_param": bits}}


def compile_to(
    source: str | Path | nn.Module,
    out: Path,
    request: Request,
    *,
    is_forced: bool = False,
    is_resumed: bool = False,
    is_dry: bool = False,
    example_inputs: Inputs = None,
    on_progress: Progress = silent,
    manage: Manage = PassManager,
    engine: Engine = IN_PROCESS,
) -> Result:
    """Compile a model into an artifact folder.

    Args:
        source: local folder, GGUF file, hub id, "demo", or a module in memory.
        out: folder to write.
        request: how to choose the specs.
        is_forced: replace an existing artifact.
        is_resumed: continue an interrupted run.
        is_dry: plan and report, write nothing.
        example_inputs: to trace and measure the model on; made from its config where transformers knows it.
        on_progress: told of long work.
        manage: makes the manager that runs the passes.
        engine: reads, prices and packs what needs no other tensor; the bytes are the same whichever it is.

    Raises:
        UsageError: bad arguments, target, passes, plan or weight; another process writes ``out``.
        SourceError: the source cannot be read or captured.
        BudgetError: no plan meets the budget.
    """
    manager = manage(
        pipeline_of(request)
    )  # what is wrong with the request is said before the model is opened
    with ExitStack() as stack:
        # Held from here on, so that two do not work for an hour and then one is refused.
        claim = (
            stack.enter_context(
                FolderClaim(out, is_forced=is_forced, is_resumed=is_resumed, is_resumable=True)
            )
            if not is_dry
            else None
        )
        started = perf_counter()
        checkpoint = stack.enter_context(open_checkpoint(source))
        seconds = {"open": perf_counter() - started}
        started = perf_counter()
        asked = request
        request, trials = settled(asked, checkpoint, example_inputs=example_inputs, on_progress=on_progress)
        if request is not asked:
            manager = manage(pipeline_of(request))
            seconds["try"] = perf_counter() - started
        run = run_passes(
            checkpoint,
            manager,
            request.calibrate,
            is_measured=request.wants_moments(),
            most=request.most_inputs,
            without=lambda: unmeasured(request),
            example_inputs=example_inputs,
            on_progress=on_progress,
            engine=engine,
        )
        program = run.program
        check_request(program, request)
        started = perf_counter()
        lowered = lower(program)
        seconds |= {**run.seconds, "lower": perf_counter() - started}
        source_bytes = sum(info.nbytes for info in checkpoint.tensors().values())
        target = None if is_dry else out
        result = Result(
            checkpoint.label,
            program,
            stored_bytes(program),
            source_bytes,
            target,
            request.target,
            records(lowered),
            seconds,
            skipped_passes(lowered),
            trials,
        )
        if claim is None:
            return result
        started = perf_counter()
        with _writer(checkpoint, program, out, claim, is_resumed) as writer:
            with out_of_memory("packing", "packing needs a few of the largest tensors; give it more memory"):
                in_order = pack_to(program, writer)
            checkpoint.save_companions(writer.partial)
            config = writer.partial / "config.json"
            data = read_json(config) if config.exists() else None
            sections = [] if program.untraced else [graph_section(run.captured, program)]
            plan, scores = _plan_file(result, writer), program.get(SCORES)
            writer.commit(documents(plan, data, scores, sections, writer.digests()))
        seconds["pack"] = perf_counter() - started
    return replace(result, in_order=tuple(in_order))


def _writer(
    checkpoint: Checkpoint,
    program: Program,
    out: Path,
    claim: FolderClaim,
    is_resumed: bool,
) -> Writer:
    assert program.plan is not None
    identity = {
        "source": checkpoint.fingerprint(),
        "weights": {
            name: [str(choice.spec), choice.quantizer] for name, choice in program.plan.weights.items()
        },
        "kbitc": VERSION,
        "torch": torch.__version__,
        "calibration": program.get(CALIBRATION),
        "changed": sorted(name for changes in program.changes for name in changes),
        "changes": {name: record.digest for name, record in records(program).items()},
        "packed": {
            name: [digest_of_tensor(tensor) for tensor in stored_tensors(packed).values()]
            for name, packed in program.packed.items()
        },
    }
    return Writer(out, stored_slots(program), identity, is_resumed=is_resumed, claim=claim)


def _plan_file(result: Result, writer: Writer) -> PlanFile:
    """What the artifact's plan file says, once everything is packed."""
    program = result.program
    assert program.plan is not None
    weights = {}
    for name, choice in program.plan.weights.items():
        weight, note = program.weights[name], writer.done[name]
        nbytes = sum(slot.nbytes for slot in writer.slots[name].values())
        measured = replace(
            choice, error=note["error"], bits=8 * nbytes / weight.numel, quantizer=note["quantizer"]
        )
        features = (program.get(OUTLIERS) or {}).get(name)
        kept = choice.spec.outlier_count(weight.in_features)
        weights[name] = WeightEntry(
            measured,
            weight.shape,
            weight.dtype,
            weight.is_transposed,
            weight.aliases,
            None if features is None else features.to_json() | {"kept": kept},
            weight.view_of,
        )
    return PlanFile(
        source=Path(result.source).name,
        source_hash=source_hash(writer.done),
        parameters=program.parameter_count,
        nbytes=result.payload_bytes,
        source_bytes=result.source_bytes,
        weights=weights,
        left_alone={
            name: LeftAlone(rest.description, rest.shape, rest.aliases) for name, rest in program.rest.items()
        },
        checksums=writer.checksums,
        budget=program.plan.budget,
        calibration=program.get(CALIBRATION),
        predicted=_prediction(program),
        passes=tuple(
            PassEntry(step.name, step.nodes_before, step.nodes_after, str(step))
            for step in program.get(STEPS) or ()
        ),
        fusions=result.fusions,
        untraced=program.untraced,
    )


def _prediction(program: Program) -> Prediction | None:
    """What the score table says of the plan, whichever passes made it; None if it cannot say."""
    scores, solution = program.get(SCORES), program.get(ALLOCATION)
    assert program.plan is not None
    if scores is None:
        return None
    priced = tradeoff.priced(scores, {name: choice.spec for name, choice in program.plan.weights.items()})
    if priced is None:
        return None
    cost = math.fsum(option.cost for option in priced.values())
    # A bound on the allocator's answer says nothing of a plan that another pass changed.
    is_solved = solution is not None and math.isclose(cost, solution.cost, rel_tol=1e-9)
    return Prediction(cost, scores.unit, scores.source, solution.gap if solution and is_solved else None)


def compile_module(
    module: nn.Module,
    request: Request,
    example_inputs: Inputs = None,
    *,
    out: Path | None = None,
    is_forced: bool = False,
) -> nn.Module:
    """A copy of ``module`` whose weights are packed; the module itself is not touched.

    Unpacked parameters are copied as they are, at the source's dtype.

    Args:
        module: with plain parameters.
        request: how to choose the specs.
        example_inputs: to trace and measure the model on; made from its config where transformers knows it.
        out: also write the artifact there; the copy then has the weights that lie in it.
        is_forced: replace an existing artifact.
    """
    if out is None:
        program = plan_module(module, request, example_inputs=example_inputs)
        warn_untraced(type(module).__name__, program)
        return with_packed(module, program, packed_weights(module, program))
    result = compile_to(module, out, request, is_forced=is_forced, example_inputs=example_inputs)
    warn_untraced(result.source, result.program)
    state = Artifact.open(out).state()
    packed = ((name, value) for name, value in state.items() if isinstance(value, KbitTensor))
    return with_packed(module, result.program, packed)
