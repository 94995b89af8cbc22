"""Whatever can be evaluated, opened: an artifact, an exported folder, or a dense source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kbitc.artifact.folders import is_artifact
from kbitc.artifact.loading import load
from kbitc.artifact.reader import Artifact
from kbitc.backends import COMPRESSED, exported_kind
from kbitc.backends.onnx_export.runtime import OnnxModel
from kbitc.checkpoint import open_checkpoint
from kbitc.checkpoint.dense import dense_model, tokenizer_in, tokenizer_of
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.adapters import WEIGHTS, put_adapter


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, packed or dense.

    Attributes:
        model: in eval mode.
        nbytes: bytes of its stored tensors.
        bits_per_param: stored bits per parameter, tied ones counted once.
        tokenizer: None if the source has none.
    """

    model: nn.Module
    nbytes: int
    bits_per_param: float
    tokenizer: Any


def open_model(source: str, dtype: torch.dtype | None = None, adapter: Path | None = None) -> Loaded:
    """Load an artifact, an exported folder, or the dense model of any source, with its tokenizer.

    Args:
        source: which.
        dtype: to compute in.
        adapter: folder of PEFT's that lies over it; its bytes count to the model's.

    Raises:
        SourceError: neither, or damaged.
        UsageError: an export that other programs run, or an adapter of another model.
        BackendUnavailable: an adapter, and PEFT is not installed.
    """
    loaded = _open(source, dtype)
    if adapter is None:
        return loaded
    put_adapter(loaded.model, adapter, Artifact.open(Path(source)) if is_artifact(Path(source)) else None)
    added = (adapter / WEIGHTS).stat().st_size
    parameters = 8 * loaded.nbytes / loaded.bits_per_param
    nbytes = loaded.nbytes + added
    return replace(loaded, nbytes=nbytes, bits_per_param=8 * nbytes / parameters)


def _open(source: str, dtype: torch.dtype | None) -> Loaded:
    folder = Path(source)
    if is_artifact(folder):
        artifact = Artifact.open(folder)
        model = load(folder, dtype=dtype)
        return Loaded(model, artifact.payload_bytes, artifact.bits_per_param, tokenizer_in(folder))
    kind = exported_kind(folder)
    if kind == COMPRESSED:
        raise UsageError(
            f"{folder}: is written for vLLM and transformers, which run it; kbitc runs the artifact that it "
            "was exported from, and 'kbitc verify' compares the two"
        )
    if kind:
        exported = OnnxModel(folder)
        nbytes = int(exported.report["file_bytes"])
        return Loaded(exported, nbytes, 8 * nbytes / exported.report["parameters"], tokenizer_in(folder))
    return _open_dense(source, dtype)


def _open_dense(source: str, dtype: torch.dtype | None) -> Loaded:
    with open_checkpoint(source) as checkpoint:
        model = dense_model(checkpoint, dtype)
        parameters = sum(parameter.numel() for parameter in checkpoint.skeleton().parameters())
        nbytes = sum(info.nbytes for info in checkpoint.tensors().values())
        return Loaded(model, nbytes, 8 * nbytes / parameters, tokenizer_of(checkpoint))


def need_tokenizer(loaded: Loaded, source: str) -> Any:
    """The tokenizer.

    Raises:
        SourceError: the source has none.
    """
    if loaded.tokenizer is None:
        raise SourceError(f"{source}: has no tokenizer files, so text cannot be read; copy them into it")
    return loaded.tokenizer
