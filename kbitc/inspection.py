"""What ``kbitc inspect`` shows: of a model its weights and their outlier features, of an artifact its plan.

The one thing to know: outlier features are those that the pass ``find_outliers`` finds: on text where
some is given, by the weights of the layer before where not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kbitc import drawing
from kbitc.artifact import PLAN_FILE, Artifact
from kbitc.calibration import NONE, Calibrate, make_calibrator
from kbitc.capture import capture
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.hf_folder import skeleton_of
from kbitc.errors import UsageError
from kbitc.outlier_map import summary
from kbitc.outliers import FACT, Found
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.pipeline import PassManager
from kbitc.program import Program
from kbitc.report import render

if TYPE_CHECKING:
    from rich.console import Console

Event = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Inspection:
    """A model or an artifact, looked at.

    Attributes:
        label: as the user named it.
        program: of a model; None for an artifact, unless its graph was asked for.
        outliers: outlier features by weight name, models only.
        plan: an artifact's plan file.
    """

    label: str
    program: Program | None = None
    outliers: Mapping[str, Found] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None

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
        return {"parameters": self.program.parameter_count, "weights": weights, "left_alone": left}

    def html(self) -> str:
        """The report of an artifact.

        Raises:
            UsageError: this is a model, which has no plan yet.
        """
        if self.plan is None:
            raise UsageError(
                f"--html: {self.label} is not compiled yet, so there is no plan to report; compile it first"
            )
        return render(self.plan)

    def dot(self) -> str:
        """The canonical graph in DOT form."""
        assert self.program is not None
        return drawing.dot(self.program)

    def print(self, console: Console) -> None:
        """Tables for people."""
        if self.plan is not None:
            _print_plan(console, self.label, self.plan)
        else:
            self._print_model(console)

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


def _print_plan(console: Console, label: str, plan: Mapping[str, Any]) -> None:
    from rich.table import Table

    title = (
        f"{label}: {plan['bits_per_param']:.4f} bits per parameter, {plan['bytes'] / 1e6:,.2f} MB, "
        f"{plan['parameters']:,} parameters"
    )
    table = Table(title=title, title_justify="left")
    with_outliers = any("outlier_features" in entry for entry in plan["weights"].values())
    outliers = ("outlier features",) if with_outliers else ()
    for column in ("weight", "shape", "spec", "bits", "rel. error", *outliers, "reason"):
        table.add_column(column, justify="right" if column in ("bits", "rel. error") else "left")
    for name, entry in plan["weights"].items():
        error, bits = entry.get("error"), entry.get("bits")
        table.add_row(
            name,
            "x".join(map(str, entry["shape"])),
            entry["spec"],
            "" if bits is None else f"{bits:.3f}",
            "" if error is None else f"{error:.4f}",
            *((summary(entry["outlier_features"]),) if outliers else ()),
            entry["reason"],
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
    calibrate: Calibrate = NONE,
) -> Inspection:
    """Look at a model or an artifact.

    Args:
        source: as for compile, or an artifact's folder.
        on_event: progress.
        calibrate: text to find a model's outlier features on, as for compile; "none" looks at weights alone.
        with_graph: also capture an artifact's graph, for :meth:`Inspection.dot`.

    Raises:
        SourceError: neither, or damaged.
    """
    folder = Path(source)
    if (folder / PLAN_FILE).exists():
        artifact = Artifact.open(folder)
        program = _artifact_program(folder) if with_graph else None
        return Inspection(source, program=program, plan=artifact.plan)
    with open_checkpoint(source) as checkpoint:
        calibrator = make_calibrator(checkpoint, calibrate, on_event, is_wanted=True)
        measured = [] if calibrator is None else [MeasureMoments(calibrator)]
        passes = PassManager([Canonicalize(), *measured, FindOutliers(on_weight=on_event)])
        program = passes.run(capture(checkpoint.skeleton(), read=checkpoint.read))
        return Inspection(source, program, cast("Mapping[str, Found]", program.facts[FACT]))


def _artifact_program(folder: Path) -> Program:
    # Capture needs shapes alone: the packed model's skeleton is the source's.
    return PassManager([Canonicalize()]).run(capture(skeleton_of(folder)))
