"""The page of a study: which precision is best, the fits, the paper's claims, the checklist and every job.

The one thing to know: the page is one file that loads nothing; each of its plots also lies beside it as PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kbitc.errors import UsageError, did_you_mean
from kbitc.report.figures import inline, write_png
from kbitc.report.page import Cell, Section, code, count, number, page, render, table
from kbitc.study.checklist import checklist
from kbitc.study.claims import Claim, judged, reference_of
from kbitc.study.curves import (
    COUNTS,
    LOSS,
    MEASURES,
    PAPER,
    TOTAL,
    Family,
    Interval,
    Series,
    best_precision,
    families,
)
from kbitc.study.fits import FEWEST_SIZES, Fitted, NoFit, fit
from kbitc.study.laws import JOINT, POWER, Form
from kbitc.study.ledger import Row
from kbitc.study.plots import loss_plot, precision_plot

BUDGETS = 12
"""Rows of the table of best precisions."""


@dataclass(frozen=True)
class Findings:
    """A family of models under one way to count bits, with all that is found out about it.

    Attributes:
        family: its rows.
        reference: data type and block of the curves.
        powers: fits by precision.
        joint: fit of all precisions.
        claims: of the paper, judged.
    """

    family: Family
    reference: Series
    powers: Mapping[int, Fitted | NoFit]
    joint: Fitted | NoFit
    claims: Sequence[Claim]


@dataclass
class Plots:
    """The figures of a page, by the name of their files.

    Attributes:
        drawn: figures of matplotlib.
    """

    drawn: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, figure: Any, summary: str) -> Markup:
        """Keep a figure, and give it as a part of the page."""
        self.drawn[name] = figure
        return inline(figure, name, summary)

    def write_beside(self, out: Path) -> list[Path]:
        """Each as ``OUT-name.png``."""
        paths = [out.with_name(f"{out.stem}-{name}.png") for name in self.drawn]
        for path, figure in zip(paths, self.drawn.values(), strict=True):
            write_png(figure, path)
        return paths


def findings_of(rows: Sequence[Row], bits_count: str = TOTAL, family: str = "") -> Findings:
    """The largest family of a table, or the one that is named, looked at.

    Args:
        rows: of a table.
        bits_count: see `kbitc.study.curves.COUNTS`.
        family: part of its name; "" for the one of most models.

    Raises:
        UsageError: no row with a finite loss, no such family, or no quantized job in it.
    """
    if bits_count not in COUNTS:
        raise UsageError(did_you_mean("count of bits", bits_count, COUNTS))
    known = families(rows, bits_count)
    names = [name for name in known if family in name]
    if not known:
        raise UsageError("the table has no job with a finite loss; there is nothing to say of it")
    if not names:
        raise UsageError(f"--family: {did_you_mean('family', family, known)}")
    chosen = known[names[0]]
    reference = reference_of(chosen)
    if reference is None:
        raise UsageError("the table has 16-bit models alone; 'kbitc sweep' with --bits adds quantized ones")
    powers = {bits: _power(chosen, reference, bits) for bits in chosen.precisions(reference)}
    return Findings(chosen, reference, powers, _joint(chosen, reference), judged(chosen, reference))


def _power(family: Family, series: Series, bits: int) -> Fitted | NoFit:
    rows = [row for row in family.rows if Series.of(row) == series and row.bits == bits]
    return _fit(POWER, rows, [family.bits(row) for row in rows])


def _joint(family: Family, series: Series) -> Fitted | NoFit:
    rows = [row for row in family.rows if Series.of(row) == series]
    return _fit(JOINT, rows, [float(row.parameters) for row in rows])


def _fit(form: Form, rows: Sequence[Row], x: Sequence[float]) -> Fitted | NoFit:
    losses = [row.loss for row in rows if row.loss is not None]
    errors = [row.loss_error for row in rows if row.loss_error]
    known = errors if len(errors) == len(losses) else None
    return fit(form, [row.fingerprint for row in rows], x, [float(row.bits) for row in rows], losses, known)


def study_page(rows: Sequence[Row], family: str = "") -> tuple[str, Plots, Findings]:
    """The page, its plots, and what it is of.

    Args:
        rows: of a table.
        family: see :func:`findings_of`.

    Raises:
        UsageError: see :func:`findings_of`.
        BackendUnavailable: matplotlib is missing.
    """
    plots = Plots()
    both = [findings_of(rows, bits_count, family) for bits_count in (TOTAL, PAPER)]
    main = both[0]
    own = main.family
    facts = {
        "jobs of this family": f"{len(own.rows) + len(own.left_out)}",
        "models": str(len(own.models)),
        "jobs in the table": str(len(rows)),
        "tokens scored by a job": f"{own.rows[0].tokens:,}",
    }
    sections = [
        Section("The paper's claims", _claims(both)),
        *(_precisions(found.family, found.reference, found.powers, plots) for found in both),
        _accuracies(main, plots),
        *(_fits(found, plots) for found in both),
        Section("Data types and block sizes", _kinds(own, plots)),
        _checklist(both[1]),
        _others(rows, own),
        Section("Every job", _jobs(rows)),
    ]
    first = own.rows[0]
    subtitle = (
        f"{first.text}, windows of {first.context}; kbitc {first.kbitc}, torch {first.torch}, transformers "
        f"{first.transformers}; curves are of {main.reference}"
    )
    return page("Scaling of k-bit models", subtitle, facts, sections), plots, main


def _claims(both: Sequence[Findings]) -> Markup:
    rows: list[list[Cell | str]] = []
    for each in zip(*(found.claims for found in both), strict=True):
        alike = len({(claim.verdict, claim.evidence) for claim in each}) == 1
        for found, claim in zip(both[:1] if alike else both, each, strict=False):
            counted = "both" if alike else found.family.count
            rows.append([claim.text, Cell(claim.verdict), Cell(counted), Cell(claim.evidence, is_soft=True)])
    note = (
        "Intervals are of 95 %. Those at the same models and formats resample models and windows; those at "
        "equal bits resample windows, and do not know how another training of the same sizes would differ."
    )
    columns = ("claim", "answer", "count of bits", "figures")
    return render("noted", note=note, body=table(columns, rows))


def _accuracies(found: Findings, plots: Plots) -> Section:
    family = found.family.by_accuracy()
    reference = None if family is None else reference_of(family)
    if family is None or reference is None:
        note = "No quantized job was scored on zero-shot tasks; kbitc sweep --tasks does that."
        return Section("Best precision by accuracy", render("noted", note=note, body=Markup()))
    return _precisions(family, reference, {}, plots)


def _precisions(
    family: Family, reference: Series, powers: Mapping[int, Fitted | NoFit], plots: Plots
) -> Section:
    is_loss = family.measure == LOSS
    title = f"Best precision by {'' if is_loss else 'accuracy and '}{family.count} bits"
    curves = family.curves(reference)
    if not curves:
        return Section(title, render("noted", note="One model: there is no curve over sizes.", body=Markup()))
    figure = precision_plot(family, reference, powers, is_fitted=False)
    name = f"{family.count}-{'precision' if is_loss else 'accuracy'}"
    drawn = plots.add(
        name, figure, f"{MEASURES[family.measure]} against {COUNTS[family.count]}, a line a precision"
    )
    best = best_precision(curves)
    if best is None:
        return Section(title, render("noted", note="No two precisions share a range of bits.", body=drawn))
    shares: list[list[Cell | str]] = [
        [Cell(str(bits), bits), number(s.value, ".3f"), number(s.low, ".3f"), number(s.high, ".3f")]
        for bits, s in best.shares.items()
    ]
    step = max(1, len(best.places) // BUDGETS)
    budgets: list[list[Cell | str]] = [
        [Cell(f"{place:,.0f}", float(place)), Cell(str(winner), winner)]
        for place, winner in list(zip(best.places, best.winners, strict=True))[::step]
    ]
    note = (
        "Straight lines between models over the logarithm of the bits, as the paper has them. The share of "
        "the axis that a precision wins is counted where all precisions have a curve; its interval is over "
        f"{'windows' if is_loss else f'examples: {family.rows[0].tasks}; curves of {reference}'}."
    )
    body = render(
        "tables",
        parts=[
            ("", drawn),
            ("share of the axis won", table(("bits of a code", "share", "low", "high"), shares)),
            ("best precision at a budget", table((COUNTS[family.count], "bits of a code"), budgets)),
        ],
    )
    return Section(title, render("noted", note=note, body=body))


def _fits(found: Findings, plots: Plots) -> Section:
    title = f"Fits over {found.family.count} bits"
    every = {f"{bits} bits": fitted for bits, fitted in found.powers.items()}
    if found.family.count == TOTAL:
        every["all precisions"] = found.joint
    done = {name: fitted for name, fitted in every.items() if isinstance(fitted, Fitted)}
    none = {name: fitted.reason for name, fitted in every.items() if isinstance(fitted, NoFit)}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in none.items())
    if not done:
        note = f"No fit, of fewer than {FEWEST_SIZES} sizes above all. {reasons}."
        return Section(title, render("noted", note=note, body=Markup()))
    figure = precision_plot(found.family, found.reference, found.powers, is_fitted=True)
    drawn = plots.add(f"{found.family.count}-fits", figure, f"{POWER.equation}, a fit a precision")
    parts = [
        ("", drawn),
        ("parameters", _parameters(done)),
        ("how well", _quality(done)),
    ]
    note = f"{POWER.equation} at each precision{f'; {JOINT.equation}' if 'all precisions' in done else ''}."
    note += f" Not fitted: {reasons}." if reasons else ""
    return Section(title, render("noted", note=note, body=render("tables", parts=parts)))


def _parameters(done: Mapping[str, Fitted]) -> Markup:
    rows: list[list[Cell | str]] = [
        [name, parameter, *(number(value, ".4g") for value in figures)]
        for name, fitted in done.items()
        for parameter, figures in _figures(fitted)
    ]
    columns = ("of", "parameter", "value", "low", "high", "models resampled: low", "high")
    return table(columns, rows)


def _figures(fitted: Fitted) -> list[tuple[str, list[float | None]]]:
    """Parameters by name, each with its intervals; first what x is relative to."""
    scale: list[float | None] = [fitted.scale, None, None, None, None]
    each: list[tuple[str, list[float | None]]] = [
        (name, [own.value, own.low, own.high, own.models_low, own.models_high])
        for name, own in fitted.parameters.items()
    ]
    return [("x0 or N0", scale), *each]


def _quality(done: Mapping[str, Fitted]) -> Markup:
    rows: list[list[Cell | str]] = [
        [
            name,
            count(fitted.points),
            count(fitted.sizes),
            number(fitted.explained, ".5f"),
            Cell(f"{100 * fitted.spread:.2g} %", fitted.spread),
            Cell(f"{fitted.reached} of {fitted.starts}"),
            Cell("" if fitted.held_out is None else f"{100 * fitted.held_out.error:.2g} %"),
            fitted.warning or "no",
        ]
        for name, fitted in done.items()
    ]
    columns = ("of", "points", "sizes", "R²", "residuals", "starts at the best", "largest held out: error")
    return table((*columns, "of another law?"), rows)


def _kinds(family: Family, plots: Plots) -> Markup:
    plain = [series for series in family.series if series.is_plain]
    lines: dict[str, dict[int, Interval]] = {}
    for series in plain:
        base = Series("fp16", 0, "absmax", series.scope)
        for bits in family.precisions(series):
            gap = family.paired([(base, 16)], [(series, bits)])
            if gap is not None:
                lines.setdefault(str(series), {})[bits] = gap
    rows: list[list[Cell | str]] = [
        [Cell(str(bits), bits), name, *(number(v, ".4f") for v in (gap.value, gap.low, gap.high))]
        for name, points in lines.items()
        for bits, gap in points.items()
    ]
    smallest = min((series.block for series in plain), default=0)
    shown = {str(s): lines[str(s)] for s in plain if s.block == smallest and str(s) in lines}
    label = "loss above 16 bits, nats per token"
    drawn = plots.add(
        "types", loss_plot(shown, label), f"Data types at blocks of {smallest}: {label}, mean of the models"
    )
    note = (
        "The mean over models of the loss above the same model at 16 bits; intervals over models and windows."
    )
    columns = ("bits of a code", "kind", "loss above 16 bits", "low", "high")
    body = render("tables", parts=[("", drawn), ("", table(columns, rows, name="kinds"))])
    return render("noted", note=note, body=body)


def _checklist(found: Findings) -> Section:
    answers = checklist(found.family, found.reference, found.powers, found.joint)
    rows: list[list[Cell | str]] = [
        [part, question, answer] for part, own in answers.items() for question, answer in own.items()
    ]
    note = (
        "The items of (Mis)Fitting (2502.18969), answered from what was run, for the paper's count of bits. "
        "The items are in our words."
    )
    return Section(
        "(Mis)Fitting checklist",
        render("noted", note=note, body=table(("part", "question", "answer"), rows)),
    )


def _others(rows: Sequence[Row], shown: Family) -> Section:
    """Families that the page is not of."""
    keys = {row.key for row in shown.rows}
    other = {name: own for name, own in families(rows).items() if own.rows[0].key not in keys}
    listed: list[list[Cell | str]] = [
        [code(name), ", ".join(dict.fromkeys(row.model for row in own.rows)), count(len(own.rows))]
        for name, own in other.items()
    ]
    return Section("Other families", table(("family", "models", "jobs"), listed) if listed else Markup())


def _jobs(rows: Sequence[Row]) -> Markup:
    cells: list[list[Cell | str]] = [
        [
            Cell(code=Path(row.model).name),
            count(row.parameters),
            Cell(code=row.format),
            Cell(row.quantizer),
            Cell(row.scope),
            count(row.total_bits),
            number(row.paper_bits, ",.0f"),
            number(row.loss, ".4f"),
            number(row.loss_error, ".4f"),
            number(row.accuracy, ".4f"),
            number(row.accuracy_error, ".4f"),
            number(row.seconds, ".2f"),
        ]
        for row in rows
    ]
    columns = ("model", "parameters", "format", "quantizer", "scope", "total bits", "paper's bits", "loss")
    return table((*columns, "± standard error", "accuracy", "± its", "seconds"), cells, name="jobs")
