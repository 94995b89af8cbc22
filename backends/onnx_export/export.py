"""From a packed model to a folder for ONNX Runtime: load, describe, trace, rewrite, write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.loading import load
from kbitc.backends._exported import REPORT
from kbitc.backends.onnx_export.container import ACTIVATIONS
from kbitc.backends.onnx_export.initializers import ExportOptions
from kbitc.backends.onnx_export.package import write_package
from kbitc.backends.onnx_export.rewrite import dense_initializers, rewrite
from kbitc.backends.onnx_export.trace import describe, trace
from kbitc.errors import UsageError, did_you_mean
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.version import VERSION

OnWeights = Callable[[Mapping[str, Mapping[str, Any]]], None]
STORAGES = ("direct", "compact")


def export_onnx(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    storage: str = "direct",
    activations: str = "fp32",
    example_inputs: tuple[Any, ...] | None = None,
    force: bool = False,
    on_weights: OnWeights = lambda _: None,
) -> dict[str, Any]:
    """Write a packed model as ONNX.

    Args:
        model: with packed weights, or a compiled artifact, whose tokenizer comes along.
        folder: where to write.
        storage: "direct" stores what the matmul reads; "compact" stores k bits, widened at load, which
            takes more memory and time then.
        activations: of packed matmuls: "fp32"; "int8", rounded for each block of the weight, faster
            and less accurate; or "split", two int8 numbers each.
        example_inputs: positional inputs of a module that transformers does not know.
        force: replace an earlier export.
        on_weights: told, before anything is written, what becomes of each weight: the report's "weights".

    Returns:
        The report, as in ``kbit_export.json``.

    Raises:
        UsageError: bad options, nothing is packed, or the folder exists, cannot be written, or is being
            written by another process.
        SourceError: not an artifact, or an operation of the model has no ONNX form.
    """
    for kind, name, known in (
        ("storage", storage, STORAGES),
        ("kind of activations", activations, ACTIVATIONS),
    ):
        if name not in known:
            raise UsageError(did_you_mean(kind, name, known))
    with FolderClaim(Path(folder), is_forced=force, marker=REPORT) as claim:
        return _export(model, claim, ExportOptions(storage, activations), example_inputs, on_weights)


def _export(
    model: nn.Module | str | Path,
    claim: FolderClaim,
    options: ExportOptions,
    example_inputs: tuple[Any, ...] | None,
    on_weights: OnWeights,
) -> dict[str, Any]:
    companions = None if isinstance(model, nn.Module) else Path(model)
    if companions is not None:
        loaded = load(companions, dtype=torch.float32)
    else:
        assert isinstance(model, nn.Module)
        loaded = _in_float32(model)
    if not any(isinstance(parameter, KbitTensor) for parameter in loaded.parameters()):
        raise UsageError("nothing in this model is packed; compile it first with kbitc.compile")
    signature = describe(loaded, example_inputs)
    traced = trace(loaded, signature)
    weights = rewrite(traced, options)
    on_weights(weights)
    report = {
        "kbitc": VERSION,
        "kind": signature.kind,
        "storage": options.storage,
        "activations": options.activations,
        "source": None if companions is None else str(companions.absolute()),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "weights": weights,
        "left_alone": dense_initializers(traced.model.graph, weights),
    }
    return write_package(
        claim,
        traced.model,
        report,
        config=getattr(loaded, "config", None),
        generation_config=getattr(loaded, "generation_config", None),
        signature=signature,
        companions=companions,
    )


def _in_float32(model: nn.Module) -> nn.Module:
    """The model itself if it computes in float32 on the CPU, else a copy that does."""
    tensors = [*model.parameters(), *model.buffers()]
    is_ready = all(
        t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors
    )
    if is_ready and not model.training:
        return model
    # Not the model's own float(): transformers refuses it for packed models.
    return nn.Module.to(copy.deepcopy(model), device="cpu", dtype=torch.float32).eval()
