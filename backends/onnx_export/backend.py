"""ONNX: a packed model as a folder that ONNX Runtime and ONNX Runtime GenAI run, weights still packed.

before:  a model with KbitTensor parameters
after:   model.onnx, model.onnx.data, configs, tokenizer, and kbit_export.json: container, size and error
         of each weight

The one thing to know: PyTorch's exporter writes everything but the packed weights; each use of one is a
marked node in its graph, which is replaced by ONNX Runtime's packed matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from kbitc.backends.onnx_export.target import OnnxTarget

PACKAGES = ("onnx", "onnx_ir", "onnxscript")


@dataclass(frozen=True)
class OnnxExport:
    """Writes folders; running them is ONNX Runtime's."""

    format: ClassVar[str] = "onnx"

    def missing(self) -> str | None:
        """The packages of the extra [onnx] that writing needs."""
        absent = [name for name in PACKAGES if find_spec(name) is None]
        if not absent:
            return None
        return f"{' and '.join(absent)} is not installed; install it with: pip install 'kbitc[onnx]'"

    def target(self) -> OnnxTarget:
        """Its containers."""
        from kbitc.backends.onnx_export.target import OnnxTarget

        return OnnxTarget()

    def export(
        self,
        model: nn.Module | str | Path,
        folder: str | Path,
        *,
        storage: str = "direct",
        activations: str = "fp32",
        example_inputs: tuple[Any, ...] | None = None,
        force: bool = False,
        on_weights: Callable[[Mapping[str, Mapping[str, Any]]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """See `kbitc.backends.onnx_export.export.export_onnx`."""
        from kbitc.backends.onnx_export.export import export_onnx

        return export_onnx(
            model,
            folder,
            storage=storage,
            activations=activations,
            example_inputs=example_inputs,
            force=force,
            on_weights=on_weights,
        )


BACKEND = OnnxExport
