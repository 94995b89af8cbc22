"""``kbitc scaling``: what a sweep's table says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples

if TYPE_CHECKING:
    from kbitc.study.page import Findings


@app.command(
    "scaling",
    epilog=examples(
        "kbitc scaling results.parquet",
        "kbitc scaling results.parquet -o report.html",
        "kbitc scaling results.parquet --json",
    ),
)
def scaling(
    results: Annotated[Path, typer.Argument(help="The table of 'kbitc sweep'.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the page here, and its plots beside it as PNG.")
    ] = None,
    family: Annotated[
        str, typer.Option(help="Part of a family's name, as --json has it. [default: the one of most models]")
    ] = "",
    as_json: Json = False,
) -> None:
    """The best precision for any budget, scaling laws with intervals, and the k-bit paper's claims."""
    from kbitc.study.ledger import read_table
    from kbitc.study.page import findings_of, study_page

    rows = read_table(results)
    with console.progress("fitting") as update:
        update("fits", 0, 0)
        if out is None:
            found, beside = findings_of(rows, family=family), []
        else:
            html, plots, found = study_page(rows, family)
            beside = plots.write_beside(out)
            console.write_file(out, html)
    if as_json:
        console.print_json(_to_json(found))
        return
    console.out.print(_claims(found))
    if out is not None:
        console.out.print(f"{out}, and {len(beside)} plots beside it", highlight=False)


def _claims(found: Findings) -> Table:
    table = Table(
        title=f"{len(found.family.models)} models, curves of {found.reference}", title_justify="left"
    )
    for column in ("claim of the k-bit paper", "answer", "figures"):
        table.add_column(column)
    for claim in found.claims:
        table.add_row(claim.text, claim.verdict, claim.evidence)
    return table


def _to_json(found: Findings) -> dict[str, Any]:
    from dataclasses import asdict

    from kbitc.study.fits import Fitted

    def told(fitted: Any) -> dict[str, Any]:
        if not isinstance(fitted, Fitted):
            return {"reason": fitted.reason}
        parameters = {name: asdict(own) for name, own in fitted.parameters.items()}
        return {"parameters": parameters, "scale": fitted.scale, "warning": fitted.warning}

    return {
        "family": f"{found.family.rows[0].family}, {found.reference.scope}",
        "models": len(found.family.models),
        "curves": str(found.reference),
        "claims": [asdict(claim) for claim in found.claims],
        "fits": {str(bits): told(fitted) for bits, fitted in found.powers.items()}
        | {"joint": told(found.joint)},
    }
