"""``kbitc export``: other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples
from kbitc.errors import UsageError


@app.command(
    epilog=examples(
        "kbitc export demo-4bit --format onnx -o demo-onnx",
        "kbitc export demo-4bit --format onnx -o demo-onnx --storage compact --activations split",
    )
)
def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compiled artifact.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    to: Annotated[str, typer.Option("--format", metavar="onnx", help="Format to write.")] = "onnx",
    storage: Annotated[
        str,
        typer.Option(
            metavar="direct|compact",
            help="direct stores what the matmul reads; compact k bits a weight, widened at load.",
        ),
    ] = "direct",
    activations: Annotated[
        str,
        typer.Option(
            metavar="fp32|int8|split",
            help="Of packed matmuls: as they are, rounded to 8 bits a block, or two such numbers each.",
        ),
    ] = "fp32",
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a compiled model for ONNX Runtime, its weights packed."""
    from kbitc.backends import find_backend

    if to != "onnx":
        raise UsageError(f"--format {to}: kbitc exports to onnx only")
    with console.progress("exporting"):
        exporter = find_backend("onnx_export")()
        report = exporter.export(model, out, storage=storage, activations=activations, force=force)
    if as_json:
        console.print_json(report)
        return
    table = Table(title=f"{out}: {report['kind']}, {storage}, {activations}", title_justify="left")
    for column in ("weight", "format", "container", "bytes", "container error", "of quantization error"):
        table.add_column(column, justify="left" if column in ("weight", "format", "container") else "right")
    for name, entry in report["weights"].items():
        table.add_row(
            name,
            entry["spec"],
            entry["container"],
            f"{entry['bytes']:,}",
            f"{entry['error']:.1e}" if entry["error"] else "exact",
            f"{100 * entry['share_of_quantization_error']:.1f} %",
        )
    console.out.print(table)
    left = sum(entry["bytes"] for entry in report["left_alone"].values())
    console.out.print(
        f"{report['file_bytes'] / 1e6:,.2f} MB, of it {left / 1e6:,.2f} MB that were left alone"
    )
