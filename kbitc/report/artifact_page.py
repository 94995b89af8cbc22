"""`report.html`: one self-contained page that shows what was stored, how well, and why.

The one thing to know: it is made of an artifact's own files (plan, score table, recorded evaluations), so
that any artifact can be reported again; what only a program knows comes as further sections.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kbitc.artifact.evaluations import Evaluation
from kbitc.artifact.plan_file import PlanFile, Prediction, WeightEntry
from kbitc.planning import tradeoff
from kbitc.planning.tradeoff import STEP, Point
from kbitc.report import charts
from kbitc.report.charts import HeatCell
from kbitc.report.outlier_map import outlier_map
from kbitc.report.page import Cell, Section, code, count, number, page, render, table
from kbitc.report.parts import fusions_section, layer_map, left_alone, passes_section, shape_text
from kbitc.sensitivity.score_table import Option, ScoreTable

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
    outliers = {n: e.outlier_features for n, e in weights.items() if e.outlier_features is not None}
    parts = [
        Section("Bits and error by layer", _layers(weights)),
        Section("Formats", _formats(weights)),
        *([] if scores is None else [Section("Trade-off", _trade_off(plan, scores, measured))]),
        Section("Measured", _measured(measured)),
        Section("Plan", _plan_table(weights, scores)),
        Section("Outlier features", outlier_map(outliers) if outliers else Markup()),
        *sections,
        passes_section(plan.passes),
        fusions_section(plan.fusions),
        Section("Left at 16 bits", left_alone(plan.left_alone)),
    ]
    subtitle = f"compiled to k-bit weights by kbitc {plan.kbitc}"
    return page(plan.source, subtitle, headline_facts(plan), parts)


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
    if plan.untraced:
        facts["weights were found by module class: torch.export cannot trace the model"] = plan.untraced
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


def _layers(weights: Mapping[str, WeightEntry]) -> Markup:
    """Two heat maps: bits, and relative error."""
    bits = {n: e.choice.bits for n, e in weights.items() if e.choice.bits is not None}
    errors = {n: e.choice.error for n, e in weights.items() if e.choice.error is not None}
    return _layer_map(weights, bits, "stored bits a parameter", ".2f") + _layer_map(
        weights, errors, "relative error", ".3f"
    )


def _layer_map(
    weights: Mapping[str, WeightEntry], values: Mapping[str, float], label: str, form: str
) -> Markup:
    cells = {
        name: HeatCell(
            value,
            format(value, form).removeprefix("0"),
            f"{name}: {weights[name].spec}, {value:{form}} {label}",
        )
        for name, value in values.items()
    }
    return layer_map(cells, label)


def _formats(weights: Mapping[str, WeightEntry]) -> Markup:
    """How many weights and parameters each spec got, largest first."""
    members: dict[str, list[WeightEntry]] = defaultdict(list)
    for entry in weights.values():
        members[str(entry.spec)].append(entry)
    sizes = {spec: sum(e.numel for e in own) for spec, own in members.items()}
    total = sum(sizes.values()) or 1
    rows = [
        [
            code(spec),
            count(len(members[spec])),
            count(size),
            Cell(f"{100 * size / total:.1f} %", size),
            Cell(share=size / max(sizes.values())),
            number(_rms_error(members[spec]), ".4f"),
        ]
        for spec, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]
    return table(("spec", "weights", "parameters", "share", "", "rms relative error"), rows)


def _rms_error(entries: Sequence[WeightEntry]) -> float | None:
    """Over all parameters of the weights whose error is known."""
    known = [(e.choice.error, e.numel) for e in entries if e.choice.error is not None]
    numel = sum(own for _, own in known)
    return (sum(error**2 * own for error, own in known) / numel) ** 0.5 if numel else None


def _trade_off(plan: PlanFile, scores: ScoreTable, measured: Sequence[Evaluation]) -> Markup:
    bits, predicted = plan.bits_per_param, plan.predicted
    chosen = None if predicted is None else Point(bits, predicted.cost, "this artifact")
    is_nats = scores.unit == "nats per token"
    drawn = [
        Point(m.bits_per_param, m.increase, f"{m.model} on {m.text}")
        for m in measured
        if is_nats and m.increase is not None
    ]
    return render(
        "trade_off",
        method=METHODS.get(scores.source, scores.source),
        is_nats=is_nats,
        chart=charts.trade_off(tradeoff.curve(scores), tradeoff.uniform(scores), chosen, drawn, scores.unit),
        table=_trade_off_table(scores, bits),
    )


def _trade_off_table(scores: ScoreTable, around: float) -> Markup:
    rows = [
        [
            number(bits, ".2f"),
            number(cost, ".4g"),
            Cell("none fits") if best is None else code(best.label),
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


def _plan_table(weights: Mapping[str, WeightEntry], scores: ScoreTable | None) -> Markup:
    """Each weight's choice; with a score table that has the choices, also what was next to them."""
    columns = ["weight", "shape", "spec", "bits", "rel. error", "reason"]
    rows = {
        name: [
            Cell(code=name, wraps=True),
            Cell(shape_text(entry.shape), entry.numel),
            code(str(entry.spec)),
            number(entry.choice.bits, ".3f"),
            number(entry.choice.error, ".4f"),
            Cell(entry.choice.reason, is_soft=True),
        ]
        for name, entry in weights.items()
    }
    chosen = None if scores is None else tradeoff.priced(scores, {n: w.spec for n, w in weights.items()})
    if scores is None or chosen is None:
        return table(columns, list(rows.values()), name="plan")
    columns += ["predicted", "next smaller", "next larger", f"at −{STEP:g} bits", f"at +{STEP:g} bits"]
    fewer = tradeoff.shifted(scores, chosen, -STEP)
    more = tradeoff.shifted(scores, chosen, STEP)
    for name, row in rows.items():
        own = chosen[name]
        smaller, larger = tradeoff.neighbours(scores.options[name], own)
        row += [
            number(own.cost, ".3g"),
            _change(own, smaller),
            _change(own, larger),
            _other(fewer.get(name)),
            _other(more.get(name)),
        ]
    return render(
        "plan",
        unit=scores.unit,
        step=STEP,
        fewer=len(fewer),
        more=len(more),
        table=table(columns, list(rows.values()), name="plan"),
    )


def _change(own: Option, other: Option | None) -> Cell:
    if other is None:
        return Cell("none")
    change = f": {(other.nbytes - own.nbytes) / 1e3:+,.1f} kB, {other.cost - own.cost:+.2g}"
    return Cell(change, code=str(other.spec))


def _other(option: Option | None) -> Cell:
    return Cell("the same") if option is None else code(str(option.spec))
