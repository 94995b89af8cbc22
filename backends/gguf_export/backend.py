"""GGUF: a packed language model as one file for llama.cpp, weights in its own block types.

before:  an artifact planned with ``--for gguf``
after:   FILE.gguf with the same values, its tokenizer and chat template

The one thing to know: nothing is quantized again; codes and scales are the artifact's, laid out as llama.cpp
reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from kbitc.backends.gguf_export.target import GgufTarget


@dataclass(frozen=True)
class GgufExport:
    """Writes files with the package gguf."""

    format: ClassVar[str] = "gguf"

    def missing(self) -> str | None:
        """The package gguf."""
        return None if find_spec("gguf") else "it needs the package 'gguf': pip install 'kbitc[gguf]'"

    def target(self) -> GgufTarget:
        """Its block types."""
        from kbitc.backends.gguf_export.target import GgufTarget

        return GgufTarget()

    def export(
        self, model: nn.Module | str | Path, folder: str | Path, *, force: bool = False
    ) -> dict[str, Any]:
        """See `kbitc.backends.gguf_export.export.export_gguf`; ``folder`` is the file."""
        from kbitc.backends.gguf_export.export import export_gguf

        return export_gguf(model, folder, force=force)


BACKEND = GgufExport
