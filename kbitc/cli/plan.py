"""``kbitc plan``: another budget, without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Agree, Json, app, examples
from kbitc.cli.tables import trade_off_table
from kbitc.errors import UsageError


@app.command(
    "plan",
    epilog=examples(
        "kbitc plan smol-4bit --bits 3.5 -o plan.json",
        "kbitc plan smol-for-gguf --bits 4.5 --for gguf -o plan.json",
        "kbitc compile ./SmolLM2-135M --plan plan.json --calibrate self -o smol-3.5bit",
    ),
)
def plan_again(
    artifact: Annotated[
        Path, typer.Argument(metavar="OUT", help="An artifact of 'compile --bits', or its kbit_scores.json.")
    ],
    bits: Annotated[
        float,
        typer.Option("--bits", "-b", help="Budget: stored bits per parameter of the whole model, 2 to 8."),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan file here.")] = None,
    agree: Agree = "",
    target: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="cpu|triton|onnx|gguf|vllm",
            help="What will hold the weights; the table must be of it. [default: as compiled]",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Solve another budget from an artifact's score table, without the model."""
    from kbitc.planning.replanning import replan
    from kbitc.sensitivity.score_table import ScoreTable

    scores = ScoreTable.open(artifact)
    plan = replan(artifact, bits, agree or _agree(scores.target, target, artifact))
    if out is not None:
        console.write_file(out, json.dumps(plan, indent=1) + "\n")
    if as_json:
        console.print_json(plan)
        return
    from collections import Counter

    count = Counter(entry["spec"] for entry in plan["weights"].values())
    table = Table(title=f"{plan['bits_per_param']:.4f} stored bits per parameter", title_justify="left")
    table.add_column("format")
    table.add_column("weights", justify="right")
    for name, number in count.most_common():
        table.add_row(name, str(number))
    console.out.print(table)
    predicted = plan["predicted"]
    console.out.print(
        f"predicted cost {predicted['cost']:.4g} ({predicted['unit']}); no plan of this size costs "
        f"{100 * predicted['gap']:.2g} % less"
    )
    console.out.print(trade_off_table(scores, plan["bits_per_param"]))


def _agree(made_for: str, asked: str, artifact: Path) -> str:
    """Weights that get one spec in what the table is of.

    Raises:
        UsageError: another one is asked for, or nothing is called so here.
    """
    from kbitc.backends import find_target

    wanted = find_target(asked) if asked else None
    if asked and (wanted.name if wanted is not None else "") != made_for:
        raise UsageError(
            f"--for {asked}: the score table of {artifact} is of {made_for or 'kbitc itself'}, with its "
            f"formats and bytes; 'kbitc compile MODEL --bits B --for {asked}' makes one of {asked}"
        )
    target = find_target(made_for) if made_for else None
    return "" if target is None else target.agree
