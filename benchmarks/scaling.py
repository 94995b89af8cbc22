"""What a sweep's table says, in Markdown: losses, the k-bit paper's claims, fits.

python -m benchmarks.scaling results.parquet --markdown benchmarks/results/DATE-scaling.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.tables import Section, markdown, print_section
from kbitc.study.curves import COUNTS, PAPER, TOTAL, Series, best_precision
from kbitc.study.fits import Fitted
from kbitc.study.ledger import Row, read_table
from kbitc.study.page import Findings, findings_of

BITS = tuple((f"k{bits}", str(bits), ".4f") for bits in range(2, 9))


def losses(found: Findings) -> Section:
    """The mean over models of the loss above 16 bits, by kind and precision."""
    family, rows = found.family, []
    for series in family.series:
        base = Series("fp16", 0, "absmax", series.scope)
        gaps = {bits: family.paired([(base, 16)], [(series, bits)]) for bits in family.precisions(series)}
        told = {f"k{bits}": f"{gap.value:+.4f}" for bits, gap in gaps.items() if gap is not None}
        rows.append({"name": str(series), **told})
    return Section(
        "Loss above 16 bits, nats per token, mean of the models", [("name", "kind", ""), *BITS], rows
    )


def models(found: Findings) -> Section:
    """The models at 16 bits and at each precision of the reference."""
    rows = []
    for fingerprint in found.family.models:
        own = [row for row in found.family.rows if row.fingerprint == fingerprint]
        whole = next((row.loss for row in own if row.bits == 16), None)
        told = {f"k{row.bits}": row.loss for row in own if Series.of(row) == found.reference}
        name, parameters = Path(own[0].model).name, own[0].parameters
        rows.append({"name": name, "parameters": parameters, "whole": whole, **told})
    columns = [("name", "model", ""), ("parameters", "parameters", ",d"), ("whole", "16", ".4f"), *BITS]
    return Section(f"Losses, {found.reference}", columns, rows)


def shares(found: Findings) -> Section:
    """Of the axis, by series and winning precision."""
    rows = []
    for series in found.family.series:
        best = best_precision(found.family.curves(series)) if series.is_plain else None
        if best is not None:
            told = {f"k{bits}": f"{100 * own.value:.0f} %" for bits, own in best.shares.items()}
            rows.append({"name": str(series), **told})
    title = f"Share of the axis that a precision wins, {COUNTS[found.family.count]}"
    return Section(title, [("name", "kind", ""), *BITS], rows)


def claims(both: Sequence[Findings]) -> list[Section]:
    """The paper's, by count of bits."""
    columns = [("text", "claim", ""), ("verdict", "answer", ""), ("evidence", "figures", "")]
    return [
        Section(
            f"Claims, counting {COUNTS[found.family.count]}", columns, [vars(claim) for claim in found.claims]
        )
        for found in both
    ]


def fits(both: Sequence[Findings]) -> Section:
    """Parameters with their intervals, and what is wrong with a fit."""
    rows: list[dict[str, Any]] = []
    for found in both:
        every = {f"{bits} bits": fitted for bits, fitted in found.powers.items()}
        if found.family.count == TOTAL:
            every["joint"] = found.joint
        for name, fitted in every.items():
            if not isinstance(fitted, Fitted):
                rows.append({"of": f"{found.family.count}, {name}", "warning": fitted.reason})
                continue
            told = ", ".join(
                f"{key} {own.value:.3g} [{own.low:.2g}, {own.high:.2g}]"
                for key, own in fitted.parameters.items()
            )
            held = None if fitted.held_out is None else f"{100 * fitted.held_out.error:.2g} %"
            told_of = f"{found.family.count}, {name}"
            rows.append({"of": told_of, "told": told, "held": held, "warning": fitted.warning or "no"})
    columns = [("of", "of", ""), ("told", "parameters", ""), ("held", "largest held out", "")]
    return Section("Fits", [*columns, ("warning", "of another law?", "")], rows)


def head_of(rows: Sequence[Row], command: str) -> list[str]:
    """What was run."""
    first, seconds = rows[0], sum(row.seconds for row in rows)
    said = (
        f"{len(rows)} jobs, {seconds:,.0f} s of quantizing and scoring in all; {first.tokens:,} tokens of "
        f"{first.text}, windows of {first.context}; kbitc {first.kbitc}, torch {first.torch}, transformers "
        f"{first.transformers}."
    )
    return [
        "# A study of scaling",
        command,
        said,
    ]


def main() -> None:
    """Read the table, and print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--markdown", type=Path, help="write there instead")
    parser.add_argument("--about", default="", help="a paragraph on the models and the commands")
    args = parser.parse_args()
    rows = read_table(args.table)
    both = [findings_of(rows, count) for count in (TOTAL, PAPER)]
    sections = [models(both[0]), losses(both[0]), *map(shares, both), *claims(both), fits(both)]
    if args.markdown:
        args.markdown.write_text(markdown(head_of(rows, args.about), sections), encoding="utf-8")
        return
    for section in sections:
        print_section(Console(), section)


if __name__ == "__main__":
    main()
