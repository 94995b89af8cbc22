"""Models from artifacts: load and load_into.

The one thing to know: loading goes through transformers' own ``from_pretrained`` with the ``kbit``
quantizer, so that what comes back is the Hugging Face model with packed parameters, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact import verifying
from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.mixed_floats import run_in_one_dtype
from kbitc.artifact.reader import ADVICE, Artifact
from kbitc.artifact.transformers_quantizer import quantization_config, register_reader
from kbitc.checkpoint.companions import CONFIG
from kbitc.checkpoint.dense import compute_dtype, quiet_transformers
from kbitc.checkpoint.skeletons import load_config, model_classes
from kbitc.errors import SourceError, UsageError, foreign
from kbitc.system.json_file import read_json
from kbitc.tensor.kbit_tensor import KbitTensor


def load(folder: str | Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> nn.Module:
    """Load an artifact as the transformers model that it was compiled from.

    Args:
        folder: the artifact.
        dtype: compute dtype: of activations and of the unpacked rest. By default the model's own,
            but float32 instead of float16, which CPUs compute slowly.
        verify: compare the configuration and every tensor with their checksums first.

    Raises:
        SourceError: not an artifact, damaged or changed, of a newer format, or not of a transformers model.
    """
    artifact = Artifact.open(Path(folder))
    path = artifact.folder / CONFIG
    if not path.exists():
        raise SourceError(
            f"{folder}: holds the weights of a plain module, without a config.json; build the module "
            "and use kbitc.load_into(module, folder)"
        )
    data = check_config(artifact)
    register_reader()
    if verify and verifying.is_wanted():
        artifact.verify()
    model_class = model_classes(load_config(artifact.folder, str(folder)), str(folder))[0]
    wanted = dtype or compute_dtype(data)
    with verifying.done(), quiet_transformers(), foreign(f"{folder}: transformers cannot load it", ADVICE):
        model, about = model_class.from_pretrained(
            artifact.folder, dtype=wanted, trust_remote_code=False, output_loading_info=True
        )
    _check_keys(artifact, about)
    loaded: nn.Module = model.eval()
    return loaded


def check_config(artifact: Artifact) -> dict[str, Any]:
    """The config of an artifact: it names the plan's weights and formats, and no other files to read.

    Raises:
        SourceError: it does not, and transformers by itself would make a model of random weights.
    """
    config = read_json(artifact.folder / CONFIG)
    entry, wanted = config.get("quantization_config"), quantization_config(artifact.plan)
    keys = ("quant_method", "weights", "transposed")
    if not isinstance(entry, dict) or any(entry.get(key) != wanted[key] for key in keys):
        raise SourceError(
            f"{artifact.folder / CONFIG}: its quantization_config is not that of {PLAN_FILE}: one of them "
            f"was changed; {ADVICE}"
        )
    for key in ("transformers_weights", "configuration_files"):
        if key in config:
            raise SourceError(
                f"{artifact.folder / CONFIG}: names other files by '{key}', which are not read; {ADVICE}"
            )
    return config


def _check_keys(artifact: Artifact, about: Mapping[str, Any]) -> None:
    """Everything in the files has its place in the model, and the other way round."""
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, about[f"{what}_keys"]))
        if names:
            raise SourceError(
                f"{artifact.folder}: {CONFIG} is not of the model that was compiled: {len(names)} tensors "
                f"are {what}, the first is {names[0]}; {ADVICE}"
            )


def load_into(module: nn.Module, folder: str | Path, *, verify: bool = True) -> nn.Module:
    """Put an artifact's weights into a module of the same structure, in the module's dtypes.

    What is stored at 32 bits stays so in a module of 16, whose layers then compute in float32 there.

    Args:
        module: may be on the meta device; changed in place and returned.
        folder: the artifact.
        verify: compare every tensor with its checksum first.

    Raises:
        SourceError: not an artifact, or damaged.
        UsageError: names do not fit the module.
    """
    artifact = Artifact.open(Path(folder))
    if verify and verifying.is_wanted():
        artifact.verify()
    own = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    state: dict[str, Tensor] = artifact.state(
        {name: dtype for name, dtype in own.items() if _is_plain(dtype)}
    )
    kept = {name for name in artifact.plan.left_alone if _is_kept(state[name].dtype, own.get(name))}
    for name in state.keys() - artifact.plan.packed.keys() - kept:
        if _is_plain(state[name].dtype) and _is_plain(own.get(name)):
            state[name] = state[name].to(own[name])
    for name, entry in artifact.plan.weights.items():
        tensor = state[name]
        if isinstance(tensor, KbitTensor):
            state[name] = nn.Parameter(tensor, requires_grad=False)
        state.update(dict.fromkeys(entry.aliases, state[name]))
    for name, rest in artifact.plan.left_alone.items():
        state.update(dict.fromkeys(rest.aliases, state[name]))
    outcome = module.load_state_dict(state, strict=False, assign=True)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise UsageError(
            f"{folder}: does not fit this module: missing {outcome.missing_keys[:3]}, "
            f"unexpected {outcome.unexpected_keys[:3]}"
        )
    for dtype in {own[name] for name in kept}:
        run_in_one_dtype(module, dtype)
    return module


def _is_plain(dtype: torch.dtype | None) -> bool:
    """Whether a dtype is one to compute in."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize > 1


def _is_kept(stored: torch.dtype, own: torch.dtype | None) -> bool:
    """Whether a tensor is stored at 32 bits, which a module has 16 for."""
    return (
        _is_plain(stored) and _is_plain(own) and stored.itemsize > 2 and own is not None and own.itemsize == 2
    )
