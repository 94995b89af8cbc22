"""``kbitc quantizers``: what can choose the scales and codes of weights."""

from __future__ import annotations

from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples


@app.command(
    "quantizers",
    epilog=examples("kbitc quantizers", "kbitc compile demo --bits 4 --quantizer weighted"),
)
def list_quantizers(as_json: Json = False) -> None:
    """This package's quantizers and those of others installed, and what each needs to know of a weight.

    'compile --quantizer' takes one of them for every weight; a plan may name one for each.
    """
    import inspect

    from kbitc.quantizers import find_quantizer, quantizer_names

    rows = []
    for name in quantizer_names():
        quantizer = find_quantizer(name)
        summary = (inspect.getdoc(type(quantizer)) or "").partition("\n")[0]
        rows.append(
            {"name": name, "requires": [fact.name for fact in quantizer.requires], "summary": summary}
        )
    if as_json:
        console.print_json(rows)
        return
    table = Table(title=f"{len(rows)} quantizers", title_justify="left")
    for column in ("name", "requires", "summary"):
        table.add_column(column)
    for row in rows:
        table.add_row(str(row["name"]), ", ".join(row["requires"]) or "-", str(row["summary"]))
    console.out.print(table)
