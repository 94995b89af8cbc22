"""``kbitc verify``: an artifact against its checksums, an exported folder against PyTorch too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Json, app, examples
from kbitc.errors import SourceError


@app.command(
    "verify",
    epilog=examples(
        "kbitc verify demo-4bit",
        "kbitc verify demo-onnx",
        "kbitc verify demo-onnx --against demo-4bit",
        "kbitc verify demo.gguf --against demo-for-gguf",
    ),
)
def verify_folder(
    folder: Annotated[
        str, typer.Argument(metavar="PATH", help="An artifact, or what was exported from one.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="OUT", help="The artifact that it came from. [default: as recorded]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every file with its checksum, and an exported folder, run by its own program, with PyTorch."""
    from kbitc.artifact.folders import is_artifact
    from kbitc.artifact.loading import check_config
    from kbitc.artifact.reader import Artifact
    from kbitc.checkpoint.companions import CONFIG
    from kbitc.evaluation.checks import Check

    with console.progress("comparing"):
        if is_artifact(Path(folder)):
            artifact = Artifact.open(Path(folder))
            artifact.verify(is_whole=True)
            if (artifact.folder / CONFIG).exists():  # which artifacts of earlier versions have no checksum of
                check_config(artifact)
            count = len(artifact.stored) + len(artifact.plan.files or ())
            checks = [Check(f"of {count} tensors and files do not match their checksums", 0, 0)]
        else:
            checks = _verifier(Path(folder)).verify(folder, against)
    failed = [check for check in checks if not check.is_passed]
    if as_json:
        rows = [{"name": c.name, "value": c.value, "limit": c.limit, "passed": c.is_passed} for c in checks]
        console.print_json({"passed": not failed, "checks": rows})
    else:
        table = Table(title=folder, title_justify="left")
        for column in ("check", "found", "limit", ""):
            table.add_column(column, justify="left" if column == "check" else "right")
        for check in checks:
            verdict = "ok" if check.is_passed else "[bold red]FAILED[/]"
            table.add_row(check.name, f"{check.value:.6g}", f"{check.limit:.6g}", verdict)
        console.out.print(table)
    if failed:
        raise SourceError(f"{folder}: {len(failed)} of {len(checks)} checks failed, first: {failed[0].name}")


def _verifier(path: Path) -> Any:
    """What compares an export with its artifact.

    Raises:
        SourceError: it is none.
    """
    from kbitc.backends import COMPRESSED, exported_kind
    from kbitc.evaluation import compressed_verify, gguf_verify, onnx_verify
    from kbitc.system import files

    if not files.exists(path):
        raise SourceError(f"{path}: no such file or folder")
    if gguf_verify.is_gguf(path):
        return gguf_verify
    kind = exported_kind(path)
    if not kind:
        raise SourceError(
            f"{path}: neither a compiled model nor exported from one; write them with 'kbitc compile MODEL "
            "-o OUT' and 'kbitc export OUT --format onnx|gguf|compressed-tensors -o PATH'"
        )
    return compressed_verify if kind == COMPRESSED else onnx_verify
