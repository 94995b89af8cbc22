"""What every worker takes and gives: a job in, dequantized weights and their stored bytes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to quantize, and how.

    Attributes:
        options: of the tool.
        model: a folder of transformers.
        tokens: a safetensors file with ``ids``, ``(windows, length)`` int64, to calibrate on.
        scratch: an empty folder for files in between.
        threads: of the processor.
    """

    options: dict[str, Any]
    model: Path
    tokens: Path
    scratch: Path
    threads: int

    def ids(self) -> Any:
        """The calibration tokens, ``(windows, length)`` int64."""
        from safetensors.torch import load_file

        return load_file(str(self.tokens))["ids"]

    def load(self, dtype: Any = "auto") -> Any:
        """The dense model in eval mode, by default in the dtype that it is stored in."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(self.model), dtype=dtype).eval()


@dataclass
class Quantized:
    """What a tool made.

    Attributes:
        seconds: of quantization, without reading the model.
        weights: dequantized, float32, by the name of the model's parameter.
        nbytes: stored bytes of each of them: codes, scales, zeros, and codebooks that are its own.
        notes: what a reader of the table should know.
    """

    seconds: float = 0.0
    weights: dict[str, Any] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, dense: Any, nbytes: int) -> None:
        """One weight: its dense values and its stored bytes."""
        self.weights[name] = dense.detach().float().contiguous()
        self.nbytes[name] = int(nbytes)


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Name of the weight, and module, of every linear layer but the head, which peers leave at 16 bits."""
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield f"{name}.weight", module
