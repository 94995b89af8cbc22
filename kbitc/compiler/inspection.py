"""What ``kbitc inspect`` shows: of a model its weights and their outlier features, of an artifact its plan.

The one thing to know: outlier features are those that the pass ``find_outliers`` finds: on text where
some is given, by the weights of the layer before where not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbitc.artifact.evaluations import Evaluation, evaluations_of
from kbitc.artifact.folders import is_artifact
from kbitc.artifact.plan_file import PlanFile
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.hf_folder import skeleton_of
from kbitc.checkpoint.room import Room
from kbitc.compiler.calibrator import NONE, Calibrate
from kbitc.compiler.lowering import lower
from kbitc.compiler.source_path import run_passes
from kbitc.errors import UsageError
from kbitc.graph.capture import capture
from kbitc.graph.context import Progress, silent
from kbitc.graph.program import Program
from kbitc.graph.text import program_dot
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.fold_norms import FoldNorms
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import Fired, records
from kbitc.report.artifact_page import artifact_page
from kbitc.report.model_page import model_page
from kbitc.report.module_tree import graph_section
from kbitc.report.parts import fusions_section
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures
from kbitc.sensitivity.score_table import SCORES_FILE, ScoreTable

CHECKSUMS = ("checksums", "files")


@dataclass(frozen=True)
class Inspection:
    """A model or an artifact, looked at.

    Attributes:
        label: as the user named it.
        program: of a model; None for an artifact, unless its graph was asked for.
        outliers: outlier features by weight name, models only.
        plan: an artifact's plan file.
        captured: the model's graph before any pass, if it was asked for.
        scores: an artifact's score table, if it has one.
        measured: what was recorded of an artifact's loss.
        fusions: what fusion and clean-up passes did to the graph; for a model, what they would do if
            every weight were packed, by the pass.
        ignored: tensors of a source, by its own names, that the model has no place for.
    """

    label: str
    program: Program | None = None
    outliers: Mapping[str, OutlierFeatures] = field(default_factory=dict)
    plan: PlanFile | None = None
    captured: Program | None = None
    scores: ScoreTable | None = None
    measured: Sequence[Evaluation] = ()
    fusions: Mapping[str, Fired] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output."""
        if self.plan is not None:
            return {key: value for key, value in self.plan.to_json().items() if key not in CHECKSUMS}
        assert self.program is not None
        weights = {
            name: {
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "uses": [use.place for use in weight.uses],
                "kinds": list(weight.kinds),
                "aliases": list(weight.aliases),
                "is_transposed": weight.is_transposed,
                "outlier_features": self.outliers[name].to_json(),
            }
            for name, weight in self.program.weights.items()
        }
        left = {name: rest.description for name, rest in self.program.rest.items()}
        fusions = {name: record.to_json() for name, record in self.fusions.items()}
        return {
            "parameters": self.program.parameter_count,
            "weights": weights,
            "left_alone": left,
            "untraced": self.program.untraced or None,
            "ignored": list(self.ignored),
            "fusions": fusions,
        }

    def html(self) -> str:
        """The report of an artifact, or of a model what can be known before it is compiled."""
        graph = []
        if self.captured is not None and self.program is not None and not self.captured.untraced:
            graph = [graph_section(self.captured, self.program)]
        if self.plan is not None:
            return artifact_page(self.plan, self.scores, self.measured, graph)
        assert self.program is not None
        fired = [fusions_section(self.fusions)] if self.fusions else []
        return model_page(self.label, self.program, self.outliers, [*fired, *graph])

    def dot(self) -> str:
        """The canonical graph in DOT form."""
        assert self.program is not None
        if self.program.untraced:
            raise UsageError(
                f"--dot: {self.label} has no graph to draw: torch.export cannot trace it "
                f"({self.program.untraced})"
            )
        return program_dot(self.program)


def inspect(
    source: str,
    on_progress: Progress = silent,
    *,
    with_graph: bool = False,
    measured: Sequence[Path] = (),
    calibrate: Calibrate = NONE,
) -> Inspection:
    """Look at a model or an artifact.

    Args:
        source: as for compile, or an artifact's folder.
        on_progress: told of long work.
        with_graph: also capture an artifact's graph, for :meth:`Inspection.dot` and the page.
        measured: further results of ``kbitc eval --json`` to show with an artifact.
        calibrate: text to find a model's outlier features on, as for compile; "none" looks at weights alone.

    Raises:
        UsageError: a damaged score table or result.
        SourceError: neither, or damaged.
    """
    folder = Path(source)
    if is_artifact(folder):
        artifact = Artifact.open(folder)
        room = Room(len(artifact.plan.checksums), artifact.plan.parameters)
        captured = capture(skeleton_of(folder, room)) if with_graph else None
        return Inspection(
            source,
            program=None if captured is None else _planned(captured, artifact.plan),
            plan=artifact.plan,
            captured=captured,
            scores=ScoreTable.open(folder) if (folder / SCORES_FILE).exists() else None,
            measured=evaluations_of(folder, measured),
            fusions=artifact.plan.fusions,
        )
    if measured:
        raise UsageError(f"--measured: {source} is not compiled; losses are shown with an artifact")
    manager = PassManager([Canonicalize(), MeasureMoments(), FindOutliers()])
    with open_checkpoint(source) as checkpoint:
        run = run_passes(
            checkpoint,
            manager,
            calibrate,
            is_measured=True,
            without=lambda: ["measure_moments"],
            on_progress=on_progress,
        )
        program = run.program
        outliers = program.known(OUTLIERS)
        return Inspection(
            source,
            program,
            outliers,
            captured=run.captured,
            fusions=possible_fusions(program),
            ignored=checkpoint.ignored(),
        )


def _planned(captured: Program, plan: PlanFile) -> Program:
    """The artifact's program; capture needed shapes alone: the packed model's skeleton is the source's."""
    return PassManager(
        [
            Canonicalize(),
            ApplyPlan({"weights": {name: str(entry.spec) for name, entry in plan.weights.items()}}),
        ]
    ).run(captured)


def possible_fusions(program: Program) -> dict[str, Fired]:
    """What the passes that rewrite would do to a canonical program, were every weight packed."""
    if not program.weights:
        return {}
    everything = ApplyPlan({"weights": {"*": "nf4:64"}})  # no pass looks at the format
    return records(lower(PassManager([FoldNorms(), everything]).run(program)))
