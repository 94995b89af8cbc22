"""``kbitc export``: other formats."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples
from kbitc.errors import UsageError

if TYPE_CHECKING:
    from kbitc.backends import Exporting


MORE = 1.15  # times an artifact's bytes from which on an export says what each weight takes


@app.command(
    epilog=examples(
        "kbitc export demo-4bit --format onnx -o demo-onnx",
        "kbitc export demo-4bit --format onnx -o demo-onnx --storage compact --activations split",
        "kbitc export smol-for-vllm --format compressed-tensors -o smol-vllm",
        "kbitc export smol-for-gguf --format gguf -o smol.gguf",
    )
)
def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compiled artifact.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="Folder, or file of gguf, to write.")
    ],
    to: Annotated[
        str, typer.Option("--format", metavar="onnx|gguf|compressed-tensors", help="Format to write.")
    ] = "onnx",
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="direct|compact",
            help="direct stores what the matmul reads; compact k bits a weight, widened at load. "
            "[default: direct]",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|int8|split",
            help="Of packed matmuls: as they are, rounded to 8 bits a block, or two such numbers each. "
            "[default: fp32]",
        ),
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a compiled model for another program, ONNX Runtime, llama.cpp or vLLM, its weights packed."""
    from kbitc.backends import find_exporter

    exporter = find_exporter(to)
    options = {"storage": storage, "activations": activations}
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(exporter, to, given)
    note: dict[str, Any] = {}
    if not as_json and _takes(exporter, "on_weights"):
        note["on_weights"] = partial(_print_costs, to)
    with console.progress("exporting"):
        report = exporter.export(model, out, force=force, **given, **note)
    if as_json:
        console.print_json(report)
    elif "left_alone" in report:
        _print_weights(out, report)
    else:
        size = report.get("file_bytes", 0)
        console.out.print(f"written to [bold]{out}[/], {size / 1e6:,.2f} MB")


def _takes(exporter: Exporting, option: str) -> bool:
    return option in inspect.signature(exporter.export).parameters


def _print_costs(to: str, weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Before it is written: what the weights take there, where that is much more than in the artifact."""
    here, there = (sum(entry[key] for entry in weights.values()) for key in ("artifact_bytes", "bytes"))
    if there <= MORE * here:
        return
    table = Table(title=f"what the weights take in {to}, bits per parameter", title_justify="left")
    for column in ("weight", "format", "container", "artifact", to):
        table.add_column(column, justify="left" if column in ("weight", "format", "container") else "right")
    for name, entry in weights.items():
        bits = [8 * entry[key] / math.prod(entry["shape"]) for key in ("artifact_bytes", "bytes")]
        table.add_row(name, entry["spec"], entry["container"], *(f"{each:.2f}" for each in bits))
    console.err.print(table)
    console.err.print(
        f"[yellow]{there / 1e6:,.2f} MB for {here / 1e6:,.2f} MB of the artifact[/]: {to} does not hold "
        f"these formats as they are. 'kbitc compile MODEL --bits B --for {to}' plans in its own."
    )


def _check_options(exporter: Exporting, to: str, given: Mapping[str, str]) -> None:
    """Raises UsageError for an option that this format does not have."""
    taken = inspect.signature(exporter.export).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken):
        return
    known = {parameter.name for parameter in taken}
    for name in given:
        if name not in known:
            raise UsageError(f"--{name}: the format '{to}' has no such option; leave it out")


def _print_weights(out: Path, report: Mapping[str, Any]) -> None:
    """The report of an export that says what became of each weight, as `kbit_export.json` does."""
    table = Table(
        title=f"{out}: {report['kind']}, {report['storage']}, {report['activations']}", title_justify="left"
    )
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
