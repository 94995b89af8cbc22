"""``kbitc build-kernels``: the CPU kernels, now."""

from __future__ import annotations

from typing import Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples


@app.command(
    "build-kernels", epilog=examples("kbitc build-kernels", "CXX=clang++ kbitc build-kernels --force")
)
def build_kernels(
    force: Annotated[
        bool, typer.Option("--force", help="Compile even if the package or the cache holds them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile the CPU kernels now, unless the package has them; else the first packed matmul does it."""
    import torch

    from kbitc.kernels import ops  # noqa: F401  # the ops that the library's kernels belong to
    from kbitc.kernels.cpu import build

    library = build.find_library(force=force)
    torch.ops.load_library(str(library))
    chosen = torch.ops.kbit.cpu_kernels()
    if as_json:
        console.print_json({"library": str(library), "kernels": chosen})
    else:
        console.out.print(f"{library}\nthis machine runs the [bold]{chosen}[/] kernels", soft_wrap=True)
