"""The typer app, and the options that several commands have.

The one thing to know: results go to standard output, progress and errors to standard error; exit
code 0 is success, 1 a failure of the input or the machine, 2 bad usage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="kbitc",
    help="Compile PyTorch models to k-bit weights, k = 2 to 8.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="Local folder, GGUF file, hub id, or [bold]demo[/] (the model in the package).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Agree = Annotated[
    str,
    typer.Option(
        "--agree",
        metavar="input|role",
        help="Weights that get one format: those that read one value (queries, keys and values; gate and "
        "up), or those at one place of every layer.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Of the decode step: cpu (compiled, once per architecture and format), eager, or auto.",
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="fp16|SPEC[,SPEC]",
        help="How keys and values are cached: fp16, a spec such as int8:64 (half the memory), or one of keys "
        "and one of values, such as int6:64,nf4:64 (a third). [default: fp16 on the backend cpu, else as the "
        "model computes]",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="A folder of PEFT's (kbitc finetune) that was trained over OUT: its products are added as the "
        "model runs, nothing is merged.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="To compute in: activations, caches and what is not packed; auto is the model's own. Processors "
        "without bfloat16 instructions (AVX2) are faster in float32.",
    ),
]

EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="process|ray",
        help="Who does the work: this process, or workers of a Ray cluster.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Of a Ray cluster that runs already, e.g. auto or HOST:6379. [default: one is started here]",
    ),
]


def examples(*lines: str) -> str:
    """The end of a command's help: what to type."""
    return "\n\n[bold]Examples[/]\n\n" + "\n\n".join(f"  $ {line}" for line in lines)


def named_dtype(name: str) -> torch.dtype | None:
    """None for "auto".

    Raises:
        UsageError: a name that is no dtype to compute in.
    """
    import torch

    from kbitc.errors import UsageError, did_you_mean

    if name == "auto":
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(did_you_mean("dtype to compute in", name, ["auto", *known]))
    return known[name]


def check_backend(name: str) -> None:
    """Raises UsageError for a name that is neither "auto" nor a backend's."""
    from kbitc.backends import AUTO, find_backend

    if name != AUTO:
        find_backend(name)
