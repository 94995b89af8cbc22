"""What ``kbitc inspect`` shows: of a model its weights and their outlier features, of an artifact its plan.

The one thing to know: outlier features are those that the pass ``find_outliers`` finds: on text where
some is given, by the weights of the layer before where not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.markup import escape

from kbitc import drawing, model_page, report
from kbitc.artifact import PLAN_FILE, Artifact
from kbitc.calibration import NONE, Calibrate, make_calibrator
from kbitc.capture import capture
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.hf_folder import skeleton_of
from kbitc.driver import lower
from kbitc.errors import UsageError
from kbitc.fusions import Fired, lines, records
from kbitc.measured import Measured, of_artifact
from kbitc.outlier_map import summary
from kbitc.outliers import FACT, Found
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.fold_norms import FoldNorms
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.passes_page import graph_section
from kbitc.pipeline import PassManager
from kbitc.program import Program
from kbitc.scores import SCORES_FILE, Scores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Event = Callable[[str, int, int], None]


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
    """

    label: str
    program: Program | None = None
    outliers: Mapping[str, Found] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    captured: Program | None = None
    scores: Scores | None = None
    measured: Sequence[Measured] = ()
    fusions: Mapping[str, Fired] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The ``--json`` output."""
        if self.plan is not None:
            return {key: value for key, value in self.plan.items() if key != "checksums"}
        assert self.program is not None
        weights = {
            name: {
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "uses": [use.node for use in weight.uses],
                "kinds": list(weight.kinds),
                "aliases": list(weight.aliases),
                "is_transposed": weight.is_transposed,
                "outlier_features": self.outliers[name].to_json(),
            }
            for name, weight in self.program.weights.items()
        }
        left = {name: rest.reason for name, rest in self.program.rest.items()}
        fusions = {name: record.to_json() for name, record in self.fusions.items()}
        return {
            "parameters": self.program.parameter_count,
            "weights": weights,
            "left_alone": left,
            "fusions": fusions,
        }

    def html(self) -> str:
        """The report of an artifact, or of a model what can be known before it is compiled."""
        graph = []
        if self.captured is not None and self.program is not None:
            graph = [graph_section(self.captured, self.program)]
        if self.plan is not None:
            return report.render(self.plan, self.scores, self.measured, graph)
        assert self.program is not None
        fired = [report.fusions(self.fusions)] if self.fusions else []
        return model_page.render(self.label, self.program, self.outliers, [*fired, *graph])

    def dot(self) -> str:
        """The canonical graph in DOT form."""
        assert self.program is not None
        return drawing.dot(self.program)

    def print(self, console: Console) -> None:
        """Tables for people."""
        if self.plan is not None:
            self._print_plan(console, self.plan)
        else:
            self._print_model(console)
        if self.fusions and self.plan is None:
            console.print("were every weight packed (fold_norms on request only):")
        for line in lines(self.fusions):
            console.print(line, highlight=False, markup=False)

    def _print_model(self, console: Console) -> None:
        from rich.table import Table

        assert self.program is not None
        title = f"{self.label}: {self.program.parameter_count:,} parameters"
        table = Table(title=title, title_justify="left")
        for column in ("weight", "shape", "read by", "outlier features"):
            table.add_column(column)
        for name, weight in self.program.weights.items():
            tied = f" (tied: {', '.join(weight.aliases)})" if weight.aliases else ""
            shape = "x".join(map(str, weight.shape))
            table.add_row(name + tied, shape, ", ".join(weight.kinds), summary(self.outliers[name].to_json()))
        console.print(table)
        _print_left(console, {name: rest.reason for name, rest in self.program.rest.items()})

    def _print_plan(self, console: Console, plan: Mapping[str, Any]) -> None:
        console.print(f"[bold]{escape(self.label)}[/]", highlight=False)
        for name, value in report.facts(plan).items():
            console.print(f"  {escape(value):>14}  {escape(name)}", highlight=False)
        for entry in self.measured:
            console.print(
                f"  {entry.perplexity:>14.4f}  measured perplexity of {escape(entry.model)} on "
                f"{escape(entry.text)}, {entry.tokens:,} tokens",
                highlight=False,
            )
        if self.scores is not None:
            console.print(trade_off_table(self.scores, plan["bits_per_param"]))
        _print_weights(console, plan)


def trade_off_table(scores: Scores, bits: float) -> Table:
    """Budgets around one, what the best plan and the best uniform spec would cost there."""
    from rich.table import Table

    table = Table(title=f"trade-off, predicted {scores.unit}", title_justify="left")
    for column in ("stored bits", "best plan", "best uniform spec", "its cost"):
        table.add_column(column, justify="left" if "spec" in column else "right")
    for size, cost, uniform in report.trade_off_rows(scores, bits):
        other = ("none fits", "") if uniform is None else (uniform.label, f"{uniform.cost:.4g}")
        table.add_row(f"{size:.2f}", f"{cost:.4g}", *other)
    return table


def _print_weights(console: Console, plan: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{len(plan['weights'])} packed weights", title_justify="left")
    with_outliers = any("outlier_features" in entry for entry in plan["weights"].values())
    outliers = ("outlier features",) if with_outliers else ()
    for column in ("weight", "shape", "spec", "bits", "rel. error", *outliers, "reason"):
        table.add_column(column, justify="right" if column in ("bits", "rel. error") else "left")
    for name, entry in plan["weights"].items():
        error, bits = entry.get("error"), entry.get("bits")
        table.add_row(
            escape(name),
            "x".join(map(str, entry["shape"])),
            entry["spec"],
            "" if bits is None else f"{bits:.3f}",
            "" if error is None else f"{error:.4f}",
            *((summary(entry["outlier_features"]),) if outliers else ()),
            escape(entry["reason"]),
        )
    console.print(table)
    _print_left(console, {name: entry["reason"] for name, entry in plan["left_alone"].items()})


def _print_left(console: Console, reasons: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        console.print(f"left at 16 bits ({reason}): {', '.join(names[:2])}{more}", highlight=False)


def inspect(
    source: str,
    on_event: Event = lambda *_: None,
    *,
    with_graph: bool = False,
    measured: Sequence[Path] = (),
    calibrate: Calibrate = NONE,
) -> Inspection:
    """Look at a model or an artifact.

    Args:
        source: as for compile, or an artifact's folder.
        on_event: progress.
        with_graph: also capture an artifact's graph, for :meth:`Inspection.dot` and the page.
        measured: further results of ``kbitc eval --json`` to show with an artifact.
        calibrate: text to find a model's outlier features on, as for compile; "none" looks at weights alone.

    Raises:
        UsageError: a damaged score table or result.
        SourceError: neither, or damaged.
    """
    folder = Path(source)
    if (folder / PLAN_FILE).exists():
        artifact = Artifact.open(folder)
        captured = capture(skeleton_of(folder)) if with_graph else None
        # An artifact of an earlier version has no fusions.
        fusions = {n: Fired.from_json(record) for n, record in artifact.plan.get("fusions", {}).items()}
        return Inspection(
            source,
            program=None if captured is None else _planned(captured, artifact.plan),
            plan=artifact.plan,
            captured=captured,
            scores=Scores.open(folder) if (folder / SCORES_FILE).exists() else None,
            measured=of_artifact(folder, measured),
            fusions=fusions,
        )
    if measured:
        raise UsageError(f"--measured: {source} is not compiled; losses are shown with an artifact")
    with open_checkpoint(source) as checkpoint:
        calibrator = make_calibrator(checkpoint, calibrate, on_event, is_wanted=True)
        moments = [] if calibrator is None else [MeasureMoments(calibrator)]
        captured = capture(checkpoint.skeleton(), read=checkpoint.read)
        passes = PassManager([Canonicalize(), *moments, FindOutliers(on_weight=on_event)])
        program = passes.run(captured)
        outliers = cast("Mapping[str, Found]", program.facts[FACT])
        return Inspection(source, program, outliers, captured=captured, fusions=possible_fusions(program))


def _planned(captured: Program, plan: Mapping[str, Any]) -> Program:
    """The artifact's program; capture needed shapes alone: the packed model's skeleton is the source's."""
    return PassManager([Canonicalize(), ApplyPlan({"weights": plan["weights"]})]).run(captured)


def possible_fusions(program: Program) -> dict[str, Fired]:
    """What the passes that rewrite would do to a canonical program, were every weight packed."""
    if not program.weights:
        return {}
    everything = ApplyPlan({"weights": {"*": "nf4:64"}})  # no pass looks at the format
    return records(lower(PassManager([FoldNorms(), everything]).run(program)))
