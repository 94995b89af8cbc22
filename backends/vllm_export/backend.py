"""compressed-tensors: a packed model as a folder for vLLM and transformers, weights still packed.

before:  an artifact
after:   model.safetensors (or shards) with weight_packed, weight_scale and weight_shape of each packed
         weight, config.json with a quantization_config, tokenizer, and kbit_export.json

The one thing to know: nothing is quantized again; codes are the artifact's, in another order of bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from kbitc.backends.vllm_export.target import VllmTarget


@dataclass(frozen=True)
class VllmExport:
    """Writes folders; needs nothing beside kbitc."""

    format: ClassVar[str] = "compressed-tensors"

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def target(self) -> VllmTarget:
        """Its containers."""
        from kbitc.backends.vllm_export.target import VllmTarget

        return VllmTarget()

    def export(
        self, model: nn.Module | str | Path, folder: str | Path, *, force: bool = False
    ) -> dict[str, Any]:
        """See `kbitc.backends.vllm_export.export.export_compressed_tensors`."""
        from kbitc.backends.vllm_export.export import export_compressed_tensors

        return export_compressed_tensors(model, folder, force=force)


BACKEND = VllmExport
