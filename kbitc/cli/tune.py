"""``kbitc tune``: a compiled model made better at the same size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples

if TYPE_CHECKING:
    from kbitc.training.tuning import Result


@app.command(
    epilog=examples(
        "kbitc tune demo-4bit",
        "kbitc tune smol-3bit --source ./SmolLM2-135M --calibrate wikitext-2/valid.txt",
        "kbitc tune smol-3bit --source ./SmolLM2-135M -o smol-3bit-tuned --steps 64",
    )
)
def tune(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.")],
    source: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What it was compiled from. [default: as recorded]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. [default: in the place of OUT]"),
    ] = None,
    *,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="auto|self|random|TEXT",
            help="What to tune on: text that the model samples itself (the default for language models), "
            "random inputs (for other models), or a UTF-8 file.",
        ),
    ] = "auto",
    example_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Inputs to trace and run the model on, where they cannot be made from its config.",
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="To learn from; eight more are held out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimiser, of two windows each.")] = None,
    flips: Annotated[
        bool,
        typer.Option(
            "--flips",
            help="Also move single codes by one level. Takes as long again, and needs much text (--windows).",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing -o folder.")] = False,
    as_json: Json = False,
) -> None:
    """Tune scales, zero points, codebooks and norms of OUT to the 16-bit model's outputs."""
    from kbitc.graph.given_inputs import read_inputs
    from kbitc.training.distilling import ROUNDS, recipe
    from kbitc.training.tuning import tune_to

    with console.progress("tuning") as update:
        result = tune_to(
            artifact,
            source,
            out=out,
            calibrate=calibrate,
            recipe=recipe(windows=windows, steps=steps, flips=ROUNDS if flips else 0),
            example_inputs=None if example_inputs is None else read_inputs(example_inputs),
            is_forced=force,
            on_progress=update,
        )
    if as_json:
        console.print_json(result.to_json())
    else:
        print_tuning(result)


def print_tuning(result: Result) -> None:
    """What tuning did, for people."""
    tuning = result.tuning
    console.out.print(
        f"divergence from the 16-bit model on held-out {tuning.calibration}: "
        f"[bold]{tuning.before:.4g}[/] nats before, [bold]{tuning.after:.4g}[/] after {tuning.steps} steps"
        + (f" and {tuning.flips:,} codes moved" if tuning.flips else ""),
        highlight=False,
    )
    how = "written" if result.is_better else "nothing was gained: as it was"
    console.out.print(f"[bold]{result.out}[/]: {how}, in {result.seconds:.1f} s")
