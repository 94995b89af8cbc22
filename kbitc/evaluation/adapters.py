"""PEFT adapters over a compiled model: checked against it, then put into it.

The one thing to know: what does not fit is an error that names the first misfit. PEFT itself would leave out
what it has no place for, and answer as the bare model does.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kbitc.artifact.reader import Artifact
from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.safetensors_file import read_header
from kbitc.errors import BackendUnavailable, SourceError, UsageError, foreign
from kbitc.system import files
from kbitc.system.checksums import digest
from kbitc.system.json_file import read_json
from kbitc.tensor.kbit_tensor import KbitTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "kbit_finetune.json"
"""What ``kbitc finetune`` adds to the files of PEFT."""

ROOT = "base_model.model."
"""In front of a model's own names, in an adapter's file."""


def check_installed(what: str) -> None:
    """Raises BackendUnavailable if PEFT, or what Trainer needs, is not installed."""
    missing = [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"{what} needs the package '{missing[0]}': pip install 'kbitc[train]'")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that PEFT asks transformers for something by its former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def base_of(artifact: Artifact) -> str:
    """What tells one base from another: a digest over the checksums of its tensors."""
    lines = (f"{name} {checksum}" for name, checksum in sorted(artifact.plan.checksums.items()))
    return digest("\n".join(lines).encode())


def check_adapter(model: nn.Module, folder: Path, base: Artifact | None = None) -> None:
    """See that an adapter belongs to a model.

    Args:
        model: bare.
        folder: of the adapter.
        base: the artifact of the model; what ``kbitc finetune`` has trained names its own.

    Raises:
        SourceError: no adapter, or damaged.
        UsageError: an adapter of another base, or one that a packed model has no place for; the first misfit.
    """
    if not files.exists(folder / CONFIG) or not files.exists(folder / WEIGHTS):
        raise SourceError(f"{folder}: is no adapter of PEFT: it holds no {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    for name in config.get("modules_to_save") or ():
        for path, module in model.named_modules():
            if path.split(".")[-1] == name and any(isinstance(w, KbitTensor) for w in module.parameters()):
                raise UsageError(
                    f"{folder}: saves '{path}' whole (modules_to_save), whose weight is packed in the model; "
                    "train it by LoRA, or leave it alone (spec fp16) when compiling"
                )
    for key, info in read_header(folder / WEIGHTS).items():
        _check_place(model, folder, key, info.info)
    if base is not None and files.exists(folder / RECORD):
        trained = read_json(folder / RECORD).get("base")
        if trained != base_of(base):
            raise UsageError(
                f"{folder}: was trained over another model than {base.folder}: tensors differ; give the "
                "one that it was trained over"
            )


def _check_place(model: nn.Module, folder: Path, key: str, info: TensorInfo) -> None:
    """Whether the model has a layer of the right width for one tensor of LoRA."""
    path, found, rest = key.removeprefix(ROOT).partition(".lora_")
    if not found:
        return
    try:
        layer = model.get_submodule(path.replace(".base_layer", ""))
    except AttributeError as error:
        raise UsageError(f"{folder}: is of another model: this one has no '{path}'") from error
    weight = layer._parameters.get("weight")
    if weight is None or len(info.shape) != 2 or weight.dim() != 2:
        return
    sizes = set(weight.shape)
    width = info.shape[1] if rest.startswith(("A", "embedding_A")) else info.shape[0]
    if width not in sizes:
        raise UsageError(
            f"{folder}: is of another model: '{key}' has a width of {width}, and '{path}' is of shape "
            f"{tuple(weight.shape)}"
        )


def put_adapter(model: nn.Module, folder: Path, base: Artifact | None = None) -> None:
    """Load an adapter into a model of transformers, which stays of its class and decodes as before.

    Args:
        model: bare; changed in place.
        folder: of the adapter.
        base: see `check_adapter`.

    Raises:
        UsageError: see `check_adapter`.
        SourceError: PEFT cannot read it.
        BackendUnavailable: PEFT is not installed.
    """
    check_installed("--adapter")
    check_adapter(model, folder, base)
    given: Any = model
    if not hasattr(given, "load_adapter"):
        raise UsageError(f"{folder}: adapters lie over models of transformers, not over an export")
    with quiet_peft(), foreign(f"{folder}: PEFT cannot load it"):
        given.load_adapter(str(folder))
    model.eval()
