"""``kbitc merge``: an adapter packed into the weights that it lies over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples

if TYPE_CHECKING:
    from kbitc.training.merging import Merged

WORST = 5
"""Weights that are named, those that merging changed most."""


@app.command(
    epilog=examples(
        "kbitc merge demo-4bit demo-adapter -o demo-tuned",
        "kbitc merge smol-4bit adapter -o smol-tuned --text shakespeare.txt",
    )
)
def merge(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Trained over it.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT2", help="Folder to write.")],
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text: by its beginning errors are fed back, which keeps most of a small change; "
            "its end says what merging cost.",
        ),
    ] = None,
    *,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window of --text.")] = 128,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT2.")] = False,
    as_json: Json = False,
) -> None:
    """Pack OUT's weights again with ADAPTER added, each in the format that it has."""
    from kbitc.training.merging import merge_to

    with console.progress("merging") as update:
        result = merge_to(
            artifact, adapter, out, text=text, context=context, is_forced=force, on_progress=update
        )
    if as_json:
        console.print_json(result.to_json())
    else:
        print_merged(result)


def print_merged(result: Merged) -> None:
    """What merging cost, for people."""
    worst = sorted(result.errors.items(), key=lambda pair: -pair[1])[:WORST]
    console.out.print(
        f"{len(result.errors)} weights packed again with the quantizer '{result.quantizer}'; relative error "
        "of the most changed: " + ", ".join(f"{name} {error:.4f}" for name, error in worst),
        highlight=False,
    )
    if result.before is not None and result.after is not None:
        console.out.print(
            f"held-out loss: [bold]{result.before:.4f}[/] nats per token with the adapter beside, "
            f"[bold]{result.after:.4f}[/] merged",
            highlight=False,
        )
    console.out.print(f"[bold]{result.out}[/]: {result.bits_per_param:.4f} bits per parameter, as before")
