"""``kbitc passes``: which passes there are."""

from __future__ import annotations

from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples


@app.command(
    "passes", epilog=examples("kbitc passes", "kbitc passes --json", "kbitc compile demo --disable NAME")
)
def list_passes(as_json: Json = False) -> None:
    """This package's passes and those of others installed, and where each runs.

    'compile --passes' takes those that run in compile. Those that run in lowering rewrite the graph of a
    packed model, in that order, before code is made of it.
    """
    from kbitc.pipeline.defaults import LOWERING
    from kbitc.pipeline.registry import describe, pass_names

    lowering = {name: f"lowering {i}" for i, name in enumerate(LOWERING, start=1)}
    rows = [{**describe(name), "runs": lowering.get(name, "compile")} for name in pass_names()]
    if as_json:
        console.print_json(rows)
        return
    table = Table(title=f"{len(rows)} passes", title_justify="left")
    columns = ("name", "runs", "needs", "gives", "requires", "provides", "summary")
    for column in columns:
        table.add_column(column)
    for about in rows:
        cells = (about[column] for column in columns)
        table.add_row(*(", ".join(cell) or "-" if isinstance(cell, list) else str(cell) for cell in cells))
    console.out.print(table)
