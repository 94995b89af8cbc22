"""`report.html`: one self-contained page that shows what was stored, how well, and why.

The one thing to know: it is made of an artifact's own files (plan, score table, recorded evaluations), so
that any artifact can be reported again; what only a program knows comes as further sections.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kbitc.artifact.evaluations import Evaluation
from kbitc.artifact.plan_file import LeftAlone, PassEntry, PlanFile, Prediction, WeightEntry
from kbitc.graph.roles import by_role
from kbitc.pipeline.records import Fired
from kbitc.planning import tradeoff
from kbitc.planning.tradeoff import STEP, Point
from kbitc.report import charts
from kbitc.report.charts import HeatCell, HeatRow
from kbitc.report.outlier_map import outlier_map
from kbitc.report.page import Cell, Section, bar, code, join, page, paragraph, table
from kbitc.sensitivity.score_table import Option, ScoreTable

MOST_ROLES = 60
"""Of a heat map; models with more name their layers in a way that we cannot read."""

METHODS = {
    "fisher": "half the sum of rows · columns · error² over each weight, with the second moments of inputs "
    "and of gradients on the calibration text (a diagonal Fisher matrix)",
    "error": "relative squared error of each weight times its parameters, without any text",
}


def artifact_page(
    plan: PlanFile,
    scores: ScoreTable | None = None,
    measured: Sequence[Evaluation] = (),
    sections: Sequence[Section] = (),
) -> str:
    """The page of an artifact.

    Args:
        plan: its plan file.
        scores: its score table, where a budget was spent.
        measured: what evaluations found.
        sections: of those who know more than the files say.
    """
    weights = plan.weights
    chosen = None if scores is None else tradeoff.priced(scores, {n: w.spec for n, w in weights.items()})
    parts = [
        Section("Bits and error by layer", _layers(weights)),
        Section("Formats", _formats(weights)),
        *([] if scores is None else [Section("Trade-off", _trade_off(plan, scores, measured))]),
        Section("Measured", _measured(measured)),
        Section("Plan", _plan_table(weights, scores, chosen)),
        Section("Outlier features", _outliers(weights)),
        *sections,
        Section("Passes", _passes(plan.passes)),
        fusions_section(plan.fusions),
        Section("Left at 16 bits", left_alone(plan.left_alone)),
    ]
    return page(
        plan.source,
        f"compiled to k-bit weights by kbitc {plan.kbitc}",
        headline_facts(plan),
        parts,
    )


def headline_facts(plan: PlanFile) -> dict[str, str]:
    """What to know of an artifact first, by name."""
    ratio = plan.source_bytes / plan.nbytes
    budget = "" if plan.budget is None else f" of a budget of {plan.budget:g}"
    facts = {
        f"stored bits per parameter, everything counted{budget}": f"{plan.bits_per_param:.4f}",
        "stored tensors": f"{plan.nbytes / 1e6:,.2f} MB",
        f"the source, {ratio:.2f} times larger": f"{plan.source_bytes / 1e6:,.2f} MB",
        "parameters, tied ones counted once": f"{plan.parameters:,}",
    }
    if plan.predicted is not None:
        facts |= _prediction(plan.predicted)
    facts["calibration text"] = plan.calibration or "none"
    return facts


def _prediction(predicted: Prediction) -> dict[str, str]:
    name = f"predicted loss increase, {predicted.unit}"
    if predicted.unit == "nats per token":
        name += f" (perplexity × {math.exp(min(predicted.cost, 700)):.4g})"
    facts = {name: f"+{predicted.cost:.4g}"}
    if predicted.gap is not None:
        facts["proved gap: no plan of this size is predicted better by more"] = (
            f"{100 * max(predicted.gap, 0.0):.2g} %"
        )
    return facts


def fusions_section(found: Mapping[str, Fired]) -> Section:
    """What fusion and clean-up passes did, and why they left what they left."""
    rows: list[list[Cell | str]] = []
    for name, record in found.items():
        merged = sum(map(len, record.groups))
        reasons = Counter(record.left.values()).most_common()
        rows.append(
            [
                code(name),
                Cell(str(len(record.groups)), len(record.groups)),
                Cell(str(merged), merged),
                Cell(str(len(record.left)), len(record.left)),
                "; ".join(f"{count}: {reason}" for reason, count in reasons),
            ]
        )
    columns = ("pass", "fired", "names rewritten", "left", "how many, and why")
    return Section("Fusions", table(columns, rows) if rows else Markup())


def _outliers(weights: Mapping[str, WeightEntry]) -> Markup:
    features = {n: e.outlier_features for n, e in weights.items() if e.outlier_features is not None}
    return Markup(outlier_map(features)) if features else Markup()  # noqa: S704  # it escapes names itself


def _layers(weights: Mapping[str, WeightEntry]) -> Markup:
    """Two heat maps: bits, and relative error."""
    bits = {n: e.choice.bits for n, e in weights.items() if e.choice.bits is not None}
    errors = {n: e.choice.error for n, e in weights.items() if e.choice.error is not None}
    figures = []
    for title, values, shown in (
        ("stored bits a parameter", bits, "{:.2f}"),
        ("relative error", errors, "{:.3f}"),
    ):
        titles = {n: f"{n}: {weights[n].spec}, {shown.format(value)} {title}" for n, value in values.items()}
        if values:
            texts = {n: shown.format(value).removeprefix("0") for n, value in values.items()}
            figures.append(layer_map(values, texts, titles, title))
    return join(figures)


def layer_map(
    values: Mapping[str, float], shown: Mapping[str, str], titles: Mapping[str, str], title: str
) -> Markup:
    """A figure of one number a weight: roles downwards, layers to the right.

    Args:
        values: by weight name.
        shown: in the cells, by weight name.
        titles: under the pointer, by weight name.
        title: what the numbers are.
    """
    roles = by_role(values)
    stacks = {role.stack for role in roles if role.has_layers}
    rows = [
        HeatRow(
            f"{role.stack}: {role.name}" if role.has_layers and len(stacks) > 1 else role.name,
            {layer: HeatCell(values[n], shown[n], titles[n]) for layer, n in layers.items()},
            role.has_layers,
        )
        for role, layers in list(roles.items())[:MOST_ROLES]
    ]
    more = f"; {len(roles) - MOST_ROLES} more roles are in the table" if len(roles) > MOST_ROLES else ""
    return Markup("<figure><figcaption>{}{}</figcaption>{}</figure>").format(
        title.capitalize(), more, charts.heat_map(rows, title)
    )


def _formats(weights: Mapping[str, WeightEntry]) -> Markup:
    """How many weights and parameters each spec got, largest first."""
    members: dict[str, list[WeightEntry]] = defaultdict(list)
    for entry in weights.values():
        members[str(entry.spec)].append(entry)
    sizes = {spec: sum(e.numel for e in own) for spec, own in members.items()}
    total = sum(sizes.values()) or 1
    rows: list[list[Cell | str]] = []
    for spec, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        own = members[spec]
        known = [(e.choice.error, e.numel) for e in own if e.choice.error is not None]
        squared = sum(error**2 * numel for error, numel in known)
        measured = sum(numel for _, numel in known)
        error = (squared / measured) ** 0.5 if measured else None
        rows.append(
            [
                Cell(code(spec)),
                Cell(str(len(own)), len(own)),
                Cell(f"{size:,}", size),
                Cell(f"{100 * size / total:.1f} %", size),
                bar(size / max(sizes.values())),
                number(error, ".4f"),
            ]
        )
    return table(("spec", "weights", "parameters", "share", "", "rms relative error"), rows)


def _trade_off(plan: PlanFile, scores: ScoreTable, measured: Sequence[Evaluation]) -> Markup:
    curve, uniform = tradeoff.curve(scores), tradeoff.uniform(scores)
    bits, predicted = plan.bits_per_param, plan.predicted
    chosen = None if predicted is None else Point(bits, predicted.cost, "this artifact")
    is_nats = scores.unit == "nats per token"
    drawn = [
        Point(m.bits_per_param, m.increase, f"{m.model} on {m.text}")
        for m in measured
        if is_nats and m.increase is not None
    ]
    note = "" if is_nats else " Costs without text have no unit, so measured losses are not drawn."
    return (
        paragraph(
            "Every plan's cost is predicted as the sum over its weights: {}. Shared codebooks, a few "
            "kilobytes, are not counted in the curve.{}",
            METHODS.get(scores.source, scores.source),
            note,
        )
        + Markup("<figure>{}</figure>").format(charts.trade_off(curve, uniform, chosen, drawn, scores.unit))
        + trade_off_table(scores, bits)
    )


def trade_off_table(scores: ScoreTable, around: float) -> Markup:
    """:func:`tradeoff.trade_off_rows` for a page."""
    rows: list[list[Cell | str]] = [
        [
            Cell(f"{bits:.2f}", bits),
            Cell(f"{cost:.4g}", cost),
            Cell("none fits") if best is None else Cell(code(best.label)),
            number(None if best is None else best.cost, ".4g"),
            number(None if best is None or not cost else best.cost / cost, ".2f"),
        ]
        for bits, cost, best in tradeoff.trade_off_rows(scores, around)
    ]
    columns = ("stored bits", f"best plan: predicted {scores.unit}", "best uniform spec", "its cost", "times")
    return table(columns, rows)


def _measured(measured: Sequence[Evaluation]) -> Markup:
    rows: list[list[Cell | str]] = [
        [
            m.model,
            m.text,
            Cell(f"{m.tokens:,} × {m.context}", m.tokens),
            number(m.bits_per_param, ".4f"),
            number(m.perplexity, ".4f"),
            number(m.loss, ".5f"),
            number(m.increase, "+.5f"),
            number(m.divergence, ".6f"),
        ]
        for m in measured
    ]
    columns = (
        "model",
        "text",
        "tokens × window",
        "stored bits",
        "perplexity",
        "nats per token",
        "above the reference",
        "KL divergence",
    )
    return table(columns, rows) if rows else Markup()


def _plan_table(
    weights: Mapping[str, WeightEntry], scores: ScoreTable | None, chosen: Mapping[str, Option] | None
) -> Markup:
    columns = ["weight", "shape", "spec", "bits", "rel. error", "reason"]
    note = Markup()
    fewer: Mapping[str, Option] = {}
    more: Mapping[str, Option] = {}
    if scores is not None and chosen is not None:
        columns += ["predicted", "next smaller", "next larger", f"at −{STEP:g} bits", f"at +{STEP:g} bits"]
        fewer = tradeoff.shifted(scores, chosen, -STEP)
        more = tradeoff.shifted(scores, chosen, STEP)
        note = paragraph(
            "“Predicted” is the weight's share of the loss increase, in {}. Next smaller and larger are its "
            "neighbours on the convex hull of its options, with what they change in bytes and in loss. The "
            "last two columns say what each weight would get if the whole model had {} bits per parameter "
            "less ({} weights would change) or more ({}).",
            scores.unit,
            STEP,
            len(fewer),
            len(more),
        )
    rows = []
    for name, entry in weights.items():
        row: list[Cell | str] = [
            code(name),
            Cell("×".join(map(str, entry.shape)), entry.numel),
            Cell(code(str(entry.spec))),
            number(entry.choice.bits, ".3f"),
            number(entry.choice.error, ".4f"),
            Markup("<span class=why>{}</span>").format(entry.choice.reason),
        ]
        if scores is not None and chosen is not None:
            own = chosen[name]
            smaller, larger = tradeoff.neighbours(scores.options[name], own)
            row += [
                Cell(f"{own.cost:.3g}", own.cost),
                Cell(_change(own, smaller)),
                Cell(_change(own, larger)),
                Cell(_other(fewer.get(name))),
                Cell(_other(more.get(name))),
            ]
        rows.append(row)
    return note + table(columns, rows, name="plan")


def _change(own: Option, other: Option | None) -> str:
    if other is None:
        return "none"
    return Markup("{}: {:+,.1f} kB, {:+.2g}").format(
        code(str(other.spec)), (other.nbytes - own.nbytes) / 1e3, other.cost - own.cost
    )


def _other(option: Option | None) -> str:
    return "the same" if option is None else code(str(option.spec))


def _passes(passes: Sequence[PassEntry]) -> Markup:
    rows: list[list[Cell | str]] = [
        [
            Cell(code(step.name)),
            Cell(f"{step.nodes_before:,}", step.nodes_before),
            Cell(f"{step.nodes_after:,}", step.nodes_after),
            step.changes,
        ]
        for step in passes
    ]
    return table(("pass", "graph nodes before", "after", "what changed"), rows) if rows else Markup()


def left_alone(entries: Mapping[str, LeftAlone]) -> Markup:
    """Tensors that stay at 16 bits, by reason; each reason folds its tensors."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, entry in entries.items():
        by_reason[entry.reason].append(f"{name} {'×'.join(map(str, entry.shape))}")
    fold = Markup("<details><summary>{} ({} tensors)</summary><div class=ops>{}</div></details>")
    line = Markup("<code>{}</code>")
    return join(
        fold.format(reason, len(names), Markup("<br>").join(line.format(name) for name in names))
        for reason, names in by_reason.items()
    )


def number(value: float | None, form: str) -> Cell:
    """A numeric cell; empty without a value."""
    return Cell("") if value is None else Cell(format(value, form), value)
