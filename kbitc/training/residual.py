"""``--init residual`` (LoftQ): adapters start from the best low-rank fit of what quantization lost.

    scaling * B A  =  the best fit of rank r of  W - dequantize(packed)

The one thing to know: the packed weights stay as they are, so this is the first round of LoftQ; a later one
would pack W - B A again, and the plan with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbitc.artifact.reader import Artifact
from kbitc.checkpoint import open_checkpoint
from kbitc.errors import UsageError
from kbitc.graph.context import Progress, silent
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.training.preparing import check_source
from kbitc.training.tuning import recorded_source

EXTRA, ROUNDS = 8, 4
"""Of the randomised decomposition: more columns than asked for, and rounds of power iteration."""


def fit_residual(
    adapted: Any, artifact: Artifact, source: str | Path | None = None, on_progress: Progress = silent
) -> None:
    """Set A and B of every adapted linear to the fit.

    Args:
        adapted: a ``PeftModel`` of LoRA over the artifact's model; changed in place.
        artifact: of the model.
        source: what it was compiled from; by default as recorded.
        on_progress: told of each weight.

    Raises:
        UsageError: the source is another model or is not there, or its weights were changed before packing
            (``--equalize``, ``--rotate``), or an adapted layer is none of those that this knows.
        SourceError: it cannot be read.
    """
    from peft.tuners.lora import LoraLayer

    base = adapted.get_base_model()
    layers = [(path, layer) for path, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    with open_checkpoint(recorded_source(artifact) if source is None else source) as checkpoint:
        check_source(artifact, checkpoint)
        for i, (path, layer) in enumerate(layers):
            weight = getattr(layer.get_base_layer(), "weight", None)
            if hasattr(layer, "parameter_name") or "default" not in layer.lora_A:
                raise UsageError(f"--init residual: '{path}' is no linear; leave it out of --targets")
            if isinstance(weight, KbitTensor):
                _fit(layer, weight, checkpoint.read(f"{path}.weight").float(), f"{path}.weight")
            on_progress(f"fitting {path}", i + 1, len(layers))


def _fit(layer: Any, weight: KbitTensor, wanted: Tensor, name: str) -> None:
    lost = wanted - weight.dequantize(torch.float32)
    if float(lost.norm()) > 0.7 * float(wanted.norm()):
        raise UsageError(
            f"--init residual: '{name}' is nothing like what it was compiled from: passes changed it before "
            "it was packed (--equalize, --rotate); use --init plain"
        )
    if weight.is_transposed:
        lost = lost.mT
    a, b = best_fit(lost, layer.r["default"])
    scale = abs(layer.scaling["default"]) ** 0.5
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a / scale)
        layer.lora_B["default"].weight.copy_(b / scale)


def best_fit(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A ``(rank, in)`` and B ``(out, rank)`` whose product B A comes nearest to a matrix ``(out, in)``.

    The singular values are shared evenly between the two, so that both move by similar steps.
    """
    count = min(rank, *matrix.shape)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(matrix, q=min(count + EXTRA, *matrix.shape), niter=ROUNDS)
    torch.random.set_rng_state(state)
    root = s[:count].sqrt()
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    a[:count], b[:, :count] = root[:, None] * v[:, :count].mT, u[:, :count] * root
    return a, b
