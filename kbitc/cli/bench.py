"""``kbitc bench``: speed and memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Backend, Dtype, Json, Kv, app, check_backend, examples, named_dtype


@app.command(
    epilog=examples(
        "kbitc bench demo-4bit",
        "kbitc bench demo-4bit --against demo --prompt-tokens 64",
        "kbitc bench smol-int8 --dtype float32 --prompt-tokens 256",
        "kbitc bench smol-4bit --prompt-tokens 2048 --kv int8:64 --backend cpu",
    )
)
def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compiled artifact.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The 16-bit model. [default: the artifact, dequantized]"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to generate.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Runs to take the median of.")] = 3,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    kv: Kv = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed and peak memory, against the dense model and what the machine could do.

    The limit is what reading the weights from memory allows, by a bandwidth measured in the same run; below
    the table: how much of it was reached, and where the time of a token went.
    """
    from kbitc.evaluation.benchmark import compare

    check_backend(backend)
    wanted = named_dtype(dtype)
    with console.progress("measuring"):
        rows = compare(model, against, prompt_tokens, new_tokens, runs, backend, wanted, kv)
    if as_json:
        console.print_json(rows)
        return
    table = Table(title=f"{prompt_tokens} prompt + {new_tokens} new tokens, batch 1", title_justify="left")
    for column in (
        "",
        "decode tok/s",
        "prefill tok/s",
        "limit tok/s",
        "peak memory MB",
        "weights MB",
        "bits/param",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['decode']:.2f}",
            f"{row['prefill']:.1f}",
            f"{row['limit']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_param']:.3f}",
        )
    console.out.print(table)
    for name, row in rows.items():
        console.out.print(_where_it_went(name, row))


def _where_it_went(name: str, row: dict[str, Any]) -> str:
    read = f"{row['share']:.0%} of the {row['limit']:.0f} tokens/s that reading the weights allows"
    said = f"{name}: {read} ({row['bandwidth'] / 1e9:.1f} GB/s)"
    if row["spent"]:
        token = 1 / row["decode"]
        spent = row["spent"] | {"the rest": max(0.0, token - sum(row["spent"].values()))}
        kinds = ", ".join(f"{kind} {1e3 * seconds:.2f}" for kind, seconds in spent.items())
        said += f"; {1e3 * token:.2f} ms a token: {kinds}"
    if row["why_compiled"]:
        said += f"; no native step: {row['why_compiled']}"
    return said
