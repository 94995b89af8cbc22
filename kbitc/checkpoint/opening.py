"""From what the user typed to the reader of it."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import nn

from kbitc.checkpoint import demo
from kbitc.checkpoint.base import Checkpoint
from kbitc.errors import SourceError, UsageError
from kbitc.system import files

DEMO = "demo"


def open_checkpoint(source: str | Path | nn.Module, *, revision: str | None = None) -> Checkpoint:
    """Open a source model; closes as a context manager.

    Args:
        source: a module in memory, "demo", a folder, a .gguf file, or a hub id, as
            ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: there is no such source, or it cannot be read; says what to do.
        UsageError: a revision of something that has none, or a module that cannot be compiled.
        BackendUnavailable: a GGUF file without the package that reads it.
    """
    if isinstance(source, nn.Module):
        _no_revision(type(source).__name__, revision)
        from kbitc.checkpoint.module import InMemory

        return InMemory(source)
    label, path = str(source), Path(source).expanduser()
    if label == DEMO:
        _no_revision(label, revision)
        return _open_folder(demo.folder(), label)
    if files.exists(path):
        _no_revision(label, revision)
        return _open_folder(path, label) if path.is_dir() else _open_file(path, label)
    return _open_hub(label, path, revision)


def _no_revision(label: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{label}: only hub ids have revisions; leave out '{revision}'")


def _open_folder(folder: Path, label: str) -> Checkpoint:
    from kbitc.checkpoint.folder_checks import check_folder
    from kbitc.checkpoint.hf_folder import HfFolder

    check_folder(folder, label)
    return HfFolder(folder, label)


def _open_file(path: Path, label: str) -> Checkpoint:
    from kbitc.checkpoint.folder_checks import PICKLES, pickle_message

    if path.suffix == ".gguf":
        from kbitc.checkpoint.gguf_file import GgufFile

        return GgufFile(path, label)
    if path.suffix in PICKLES:
        raise SourceError(pickle_message(label, path.name))
    if path.suffix in (".safetensors", ".json"):
        raise SourceError(
            f"{label}: is one file of a model; give its folder, {path.parent}, with config.json in it"
        )
    raise SourceError(
        f"{label}: is a file, but not a .gguf; give a GGUF file, a model folder, a hub id "
        f"(org/name) or '{DEMO}'"
    )


def _open_hub(label: str, path: Path, revision: str | None) -> Checkpoint:
    from kbitc.checkpoint.hub import HUB_ID, open_hub

    near = _near(path)
    if HUB_ID.fullmatch(label) is None or path.suffix == ".gguf":
        hint = f"did you mean '{near}'?" if near else "a model of the hub is named org/name"
        raise SourceError(f"no such file or folder: {label}; {hint}")
    try:
        return open_hub(label, revision)
    except SourceError as error:
        if not near:
            raise
        raise SourceError(f"{error}. If you meant a path: did you mean '{near}'?") from error


def _near(path: Path) -> str | None:
    """What exists, and is most like a path that does not."""
    parent = path.parent
    while not files.exists(parent) and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, [*names, *([DEMO] if parent == Path() else [])], n=1)
    return str(parent / close[0]) if close else None
