"""What an inspection looks like on a console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kbitc.cli import console

if TYPE_CHECKING:
    from kbitc.artifact.plan_file import PlanFile, WeightEntry
    from kbitc.compiler.inspection import Inspection
    from kbitc.sensitivity.score_table import ScoreTable


def print_inspection(seen: Inspection) -> None:
    """Tables for people."""
    from kbitc.pipeline.records import lines

    if seen.plan is not None:
        _print_plan(seen, seen.plan)
    else:
        _print_model(seen)
    if seen.fusions and seen.plan is None:
        console.out.print("were every weight packed (fold_norms on request only):")
    for line in lines(seen.fusions):
        console.out.print(line, highlight=False, markup=False)


def trade_off_table(scores: ScoreTable, bits: float) -> Table:
    """Budgets around one, what the best plan and the best uniform spec would cost there."""
    from kbitc.planning.tradeoff import trade_off_rows

    table = Table(title=f"trade-off, predicted {scores.unit}", title_justify="left")
    for column in ("stored bits", "best plan", "best uniform spec", "its cost"):
        table.add_column(column, justify="left" if "spec" in column else "right")
    for size, cost, uniform in trade_off_rows(scores, bits):
        other = ("none fits", "") if uniform is None else (uniform.label, f"{uniform.cost:.4g}")
        table.add_row(f"{size:.2f}", f"{cost:.4g}", *other)
    return table


def _print_model(seen: Inspection) -> None:
    from kbitc.compiler.checks import untraced_note
    from kbitc.report.outlier_map import summary

    assert seen.program is not None
    title = f"{seen.label}: {seen.program.parameter_count:,} parameters"
    table = Table(title=title, title_justify="left")
    for column in ("weight", "shape", "read by", "outlier features"):
        table.add_column(column)
    for name, weight in seen.program.weights.items():
        tied = f" (tied: {', '.join(weight.aliases)})" if weight.aliases else ""
        shape = "x".join(map(str, weight.shape))
        table.add_row(name + tied, shape, ", ".join(weight.kinds), summary(seen.outliers[name].to_json()))
    console.out.print(table)
    note = untraced_note(seen.program, ())
    if note:
        console.out.print(f"[yellow]not traced[/]: {escape(note)}", highlight=False)
    _print_left({name: rest.reason for name, rest in seen.program.rest.items()})
    if seen.ignored:
        named = f"{', '.join(seen.ignored[:2])}{' ...' if len(seen.ignored) > 2 else ''}"
        console.out.print(
            f"{len(seen.ignored)} tensors of the source have no place in the model: {named}", highlight=False
        )


def _print_plan(seen: Inspection, plan: PlanFile) -> None:
    from kbitc.report.artifact_page import headline_facts

    console.out.print(f"[bold]{escape(seen.label)}[/]", highlight=False)
    for name, value in headline_facts(plan).items():
        console.out.print(f"  {escape(value):>14}  {escape(name)}", highlight=False)
    for entry in seen.measured:
        console.out.print(
            f"  {entry.perplexity:>14.4f}  measured perplexity of {escape(entry.model)} on "
            f"{escape(entry.text)}, {entry.tokens:,} tokens",
            highlight=False,
        )
    if seen.scores is not None:
        console.out.print(trade_off_table(seen.scores, plan.bits_per_param))
    _print_weights(plan)


def _print_weights(plan: PlanFile) -> None:
    table = Table(title=f"{len(plan.weights)} packed weights", title_justify="left")
    with_outliers = any(entry.outlier_features is not None for entry in plan.weights.values())
    columns = ("outlier features",) if with_outliers else ()
    for column in ("weight", "shape", "spec", "bits", "rel. error", *columns, "reason"):
        table.add_column(column, justify="right" if column in ("bits", "rel. error") else "left")
    for name, entry in plan.weights.items():
        choice = entry.choice
        table.add_row(
            escape(name),
            "x".join(map(str, entry.shape)),
            str(choice.spec),
            "" if choice.bits is None else f"{choice.bits:.3f}",
            "" if choice.error is None else f"{choice.error:.4f}",
            *((_outlier_cell(entry),) if with_outliers else ()),
            escape(choice.reason),
        )
    console.out.print(table)
    _print_left({name: entry.reason for name, entry in plan.left_alone.items()})


def _outlier_cell(entry: WeightEntry) -> str:
    from kbitc.report.outlier_map import summary

    return "" if entry.outlier_features is None else summary(entry.outlier_features)


def _print_left(reasons: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        console.out.print(f"not packed ({reason}): {', '.join(names[:2])}{more}", highlight=False)
