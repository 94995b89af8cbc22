"""``kbitc finetune``: an adapter trained over a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples

if TYPE_CHECKING:
    from kbitc.training.finetuning import Finetuned


@app.command(
    epilog=examples(
        "kbitc finetune demo-4bit --text shakespeare.txt -o demo-adapter",
        "kbitc finetune smol-3bit --text shakespeare.txt --init residual --source ./SmolLM2-135M -o adapter",
        "kbitc finetune smol-4bit --chat chats.jsonl --rank 16 --steps 500 -o adapter --resume",
    )
)
def finetune(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled language model.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="ADAPTER", help="Folder of the adapter.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text to train on.")] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Or chats, one a line: {"messages": [{"role": ..., "content": ...}, ...]}; what the '
            "assistant says is learned.",
        ),
    ] = None,
    *,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 16,
    targets: Annotated[
        str, typer.Option(metavar="all-linear|NAME,...", help="Layers that get one.")
    ] = "all-linear",
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    context: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 128,
    rate: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate at its highest.")] = 2e-4,
    alpha: Annotated[
        float | None, typer.Option(help="Products are scaled by alpha / rank. [default: twice the rank]")
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            metavar="plain|residual",
            help="'residual': start from the best fit of what quantization lost (LoftQ); needs the source.",
        ),
    ] = "plain",
    source: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What OUT was compiled from. [default: as recorded]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter, and of the order of examples.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory for a third more time a step.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps that an interruption may lose.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter (LoRA) over OUT, whose packed weights stay as they are."""
    from kbitc.training.finetune_recipe import FinetuneRecipe
    from kbitc.training.finetuning import finetune_to

    recipe = FinetuneRecipe(
        rank=rank, targets=targets, alpha=alpha, init=init, steps=steps, batch=batch, accumulate=accumulate,
        context=context, rate=rate, seed=seed, checkpointing=checkpointing, save_every=save_every,
    )  # fmt: skip
    with console.progress("fine-tuning") as update:
        result = finetune_to(
            artifact, out, text=text, chat=chat, recipe=recipe, source=source,
            is_forced=force, is_resumed=resume, on_progress=update,
        )  # fmt: skip
    if as_json:
        console.print_json(result.to_json())
    else:
        print_finetuned(result)


def print_finetuned(result: Finetuned) -> None:
    """What training did, for people."""
    losses = result.losses
    console.out.print(
        f"held-out loss: [bold]{losses.before:.4f}[/] nats per token before, [bold]{losses.after:.4f}[/] "
        f"after {result.recipe.steps} steps ({result.seconds:.2f} s each, {result.trained:,} parameters)",
        highlight=False,
    )
    console.out.print(
        f"[bold]{result.out}[/]: use it with 'kbitc run {result.artifact} --adapter {result.out} PROMPT', or "
        f"'kbitc merge {result.artifact} {result.out} -o OUT2'",
        highlight=False,
    )
