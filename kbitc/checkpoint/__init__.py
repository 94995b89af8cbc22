"""Source models: Hugging Face folders, GGUF files, hub ids, modules in memory, the demo model."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import nn

from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.errors import SourceError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

DEMO = Path(__file__).parent.parent / "demo_model"


def open_checkpoint(source: str | Path | nn.Module) -> Checkpoint:
    """Open a source model.

    Args:
        source: a module in memory, "demo", a folder, a .gguf file, or a hub id.

    Raises:
        SourceError: there is no such source, or it cannot be read; says what to do.
    """
    from kbitc.checkpoint.hf_folder import PICKLES, HfFolder, pickle_message

    if isinstance(source, nn.Module):
        from kbitc.checkpoint.module import InMemory

        return InMemory(source)
    label, path = str(source), Path(source)
    if label == "demo" and not path.exists():
        return HfFolder(DEMO, label)
    if path.is_dir():
        return HfFolder(path, label)
    if path.is_file():
        if path.suffix == ".gguf":
            from kbitc.checkpoint.gguf_file import GgufFile

            return GgufFile(path, label)
        if path.suffix in PICKLES:
            raise SourceError(pickle_message(label, path.name))
        raise SourceError(
            f"{label}: is a file, but not a .gguf; give the model's folder, here {path.parent or '.'}"
        )
    from kbitc.checkpoint.hub import PATTERN, open_hub

    if isinstance(source, str) and PATTERN.fullmatch(label) and not label.startswith((".", "/", "~")):
        return open_hub(label)
    raise SourceError(f"{label}: no such file or folder{_near(path)}")


def _near(path: Path) -> str:
    parent = path.absolute().parent
    if not parent.is_dir():
        return f"; {parent} does not exist either"
    names = [entry.name for entry in parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""
