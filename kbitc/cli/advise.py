"""``kbitc advise``: the model and format of lowest measured loss that fit a memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples

if TYPE_CHECKING:
    from kbitc.study.advise import Advice


@app.command(
    "advise",
    epilog=examples(
        "kbitc advise --from results.parquet --memory 4GB",
        "kbitc advise --from results.parquet --memory 300KB --json",
        "kbitc advise --from results.parquet --memory 4GB --by accuracy",
    ),
)
def advise_model(
    results: Annotated[Path, typer.Option("--from", metavar="FILE", help="The table of 'kbitc sweep'.")],
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Of all stored tensors: 4GB, 700MB, 1.5GiB; caches not."),
    ],
    family: Annotated[str, typer.Option(help="Part of a family's name, where the table has several.")] = "",
    by: Annotated[
        str, typer.Option(metavar="loss|accuracy", help="What decides; accuracy is the mean of the tasks.")
    ] = "loss",
    tasks: Annotated[
        str, typer.Option(help="By accuracy: part of a set of tasks' name, where the table has several.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Which model at which format to take for a memory, and the command that makes it.

    The lowest measured loss (or highest accuracy) that fits comes first, then the other models' best.
    Nothing is extrapolated.
    """
    from kbitc.study.advise import advise, parse_size
    from kbitc.study.ledger import read_table

    found = advise(read_table(results), parse_size(memory), family, by=by, tasks=tasks)
    if as_json:
        console.print_json({"memory": parse_size(memory), "advice": [_to_json(each) for each in found]})
        return
    on = f", accuracy on {found[0].row.tasks}" if by == "accuracy" else ""
    table = Table(title=escape(f"what fits {memory}{on}"), title_justify="left")
    for column in ("model", "format", "quantizer", "bytes", by, "95 % interval"):
        table.add_column(column, justify="right" if column in ("bytes", by) else "left")
    for each in found:
        row, interval = each.row, each.interval
        between = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        table.add_row(row.model, row.format, row.quantizer, f"{each.nbytes:,}", f"{each.value:.4f}", between)
    console.out.print(table)
    console.out.print(escape(found[0].command or found[0].reason), soft_wrap=True, highlight=False)


def _to_json(advice: Advice) -> dict[str, Any]:
    row = advice.row
    own = {name: getattr(row, name) for name in ("model", "family", "format", "quantizer", "scope", "loss")}
    return {
        **own,
        "accuracy": row.accuracy,
        "tasks": row.tasks,
        "by": advice.by,
        "interval": advice.interval,
        "bytes": advice.nbytes,
        "command": advice.command,
        "reason": advice.reason,
    }
