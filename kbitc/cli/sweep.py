"""``kbitc sweep``: models by formats, a row of a table each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.markup import escape
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Address, EngineName, Json, app, examples
from kbitc.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from kbitc.study.ledger import Row
    from kbitc.study.sweep import Outcome

MOST_BLOCK = 2**24


@app.command(
    "sweep",
    epilog=examples(
        "kbitc sweep demo --bits 3-8 --types int,fp,nf --blocks 64 --text heldout.txt -o results.parquet",
        "kbitc sweep ~/family/* --bits 3-8 --types int,fp+paper,dynamic,quantile --blocks 64,1024 "
        "--flat-blocks --mean --outliers proxy:2% --text ~/family/heldout.txt --context 128 -o r.parquet",
        "kbitc sweep ~/family/* --text t.txt --tasks lambada_openai,piqa --data zero_shot -o results.parquet",
        "kbitc sweep ~/family/* --bits 2-4 --types bof --quantizer feedback --text t.txt -o results.parquet",
    ),
)
def sweep_models(
    models: Annotated[list[str], typer.Argument(metavar="MODELS", help="Causal language models.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The table, a Parquet file; later sweeps add to it.")
    ],
    bits: Annotated[str, typer.Option("--bits", "-b", help="Of a code: numbers and ranges.")] = "3-8",
    types: Annotated[
        str, typer.Option(help="Data types; fp+paper, int+zp: with a variant or zero points; or all.")
    ] = "int,fp,nf,dynamic,quantile",
    blocks: Annotated[str, typer.Option(help="Weights a scale.")] = "64",
    quantizer: Annotated[
        str, typer.Option(help="What chooses codes and scales, see 'kbitc quantizers'.")
    ] = "absmax",
    outliers: Annotated[
        str,
        typer.Option(
            metavar="proxy:P%",
            help="Each format also with P % of the input features at 16 bits, by the proxy.",
        ),
    ] = "",
    mean: Annotated[bool, typer.Option("--mean", help="Each format also centred: W - mean(W).")] = False,
    flat_blocks: Annotated[
        bool, typer.Option("--flat-blocks", help="Blocks run over the ends of rows, as the paper's do.")
    ] = False,
    scope: Annotated[
        str,
        typer.Option(
            metavar="linear|all",
            help="What is quantized: attention and feed-forward layers, or embeddings too.",
        ),
    ] = "linear",
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    limit_tokens: Annotated[int | None, typer.Option(min=2, help="Score the first N tokens only.")] = None,
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT|self|random", help="For quantizers that need it, as 'kbitc compile'.")
    ] = "self",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Also zero-shot accuracies: lambada_openai, piqa, arc_easy, copa, openbookqa, winogrande, "
            "hellaswag.",
        ),
    ] = "",
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with a file NAME.jsonl for each task.")
    ] = Path(),
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each one of a task.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N examples of each task only.")] = None,
    engine: EngineName = "process",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Score models at every bits, data type and block size; a row of a table each.

    Weights are quantized in memory, and nothing but the table is written. A job that is in the table is not
    run again; the same command goes on where an interrupted one stopped. Each model is scored at 16 bits too.
    """
    from kbitc.evaluation.perplexity import read_text
    from kbitc.study.grid import (
        SCOPES,
        Grid,
        parse_bits,
        parse_numbers,
        parse_outliers,
        parse_quantizers,
        parse_types,
    )
    from kbitc.study.ledger import need_arrow
    from kbitc.study.sweep import Study, sweep
    from kbitc.study.zero_shot import parse_tasks
    from kbitc.system.engine import engine_of

    need_arrow()
    if scope not in SCOPES:
        raise UsageError(f"--scope: {did_you_mean('scope', scope, SCOPES)}")
    grid = Grid(
        bits=parse_bits(bits),
        types=parse_types(types),
        blocks=parse_numbers("--blocks", blocks, 1, MOST_BLOCK),
        quantizers=parse_quantizers(quantizer),
        outliers=parse_outliers(outliers),
        with_mean=mean,
        is_flat=flat_blocks,
    )
    grid.treatments()  # what is wrong with it is said before a model is opened
    zero_shot = parse_tasks(tasks, data, shots, limit)
    study = Study(grid, read_text(text), text.name, scope, context, limit_tokens, calibrate, zero_shot)
    if zero_shot is not None:
        zero_shot.check()
    with engine_of(engine, address) as runs, console.progress("sweeping") as update:
        outcome = sweep(models, study, out, update, engine=runs)
    if as_json:
        console.print_json(
            {"table": str(out), "rows": len(outcome.rows), "ran": outcome.ran, "known": outcome.known}
        )
        return
    console.out.print(_best(outcome, "lowest loss by bits of a code, nats per token", _loss))
    if zero_shot is not None:
        title = f"highest mean accuracy by bits of a code, percent; {zero_shot.label}"
        console.out.print(_best(outcome, title, partial(_accuracy, zero_shot.label)))
    console.out.print(
        f"{outcome.ran} jobs ran, {outcome.known} were done before; {len(outcome.rows)} rows in {out}",
        highlight=False,
    )


Told: TypeAlias = tuple[float, str]
"""How good a row is, less being better, and how it is told."""


def _loss(row: Row) -> Told | None:
    return None if row.loss is None else (row.loss, f"{row.loss:.4f}")


def _accuracy(tasks: str, row: Row) -> Told | None:
    if row.accuracy is None or row.tasks != tasks:
        return None
    return -row.accuracy, f"{100 * row.accuracy:.2f}"


def _best(outcome: Outcome, title: str, told: Callable[[Row], Told | None]) -> Table:
    """The best row of each model at each precision."""
    table = Table(title=escape(title), title_justify="left")
    bits = sorted({row.bits for row in outcome.rows})
    table.add_column("model")
    for each in bits:
        table.add_column(str(each), justify="right")
    for model in dict.fromkeys(row.model for row in outcome.rows):
        own = [(row.bits, told(row)) for row in outcome.rows if row.model == model]
        best = [min((how for k, how in own if k == each and how), default=(0.0, "")) for each in bits]
        table.add_row(model, *(text for _, text in best))
    return table
