"""``kbitc inspect``: the weights, their outlier features, and what an artifact made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples
from kbitc.cli.tables import print_inspection


@app.command(
    "inspect",
    epilog=examples(
        "kbitc inspect demo",
        "kbitc inspect demo-4bit --html demo.html --measured other.json",
        "kbitc inspect demo --dot graph.dot",
    ),
)
def inspect_model(
    model: Annotated[str, typer.Argument(metavar="MODEL|OUT", help="A model, or a compiled artifact.")],
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the canonical graph in DOT form.")] = None,
    measured: Annotated[
        list[Path],
        typer.Option(help="A result of 'eval --json' to show in an artifact's report; may be repeated."),
    ] = [],  # noqa: B006
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT|self|random|none", help="Find a model's outlier features on text.")
    ] = "none",
    as_json: Json = False,
) -> None:
    """Show the weights, their outlier features, and what an artifact made of them."""
    from kbitc.compiler.inspection import inspect
    from kbitc.system import files

    with console.progress("reading") as update:
        # An artifact of a model that transformers does not know has no config to draw its graph from.
        with_graph = dot is not None or (html is not None and files.exists(Path(model) / "config.json"))
        seen = inspect(model, update, with_graph=with_graph, measured=measured, calibrate=calibrate)
    if html is not None:
        console.write_file(html, seen.html())
    if dot is not None:
        console.write_file(dot, seen.dot())
    if as_json:
        console.print_json(seen.to_json())
    else:
        print_inspection(seen)
