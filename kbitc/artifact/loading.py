"""Models from artifacts: load and load_into.

The one thing to know: loading goes through transformers' own ``from_pretrained`` with the ``kbit``
quantizer, so that what comes back is the Hugging Face model with packed parameters, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.artifact.mixed_floats import run_in_one_dtype
from kbitc.artifact.reader import Artifact
from kbitc.artifact.transformers_quantizer import register
from kbitc.checkpoint.dense import compute_dtype, quiet_transformers
from kbitc.checkpoint.folder_checks import read_json
from kbitc.errors import SourceError, UsageError
from kbitc.tensor.kbit_tensor import KbitTensor


def load(folder: str | Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> nn.Module:
    """Load an artifact as the transformers model that it was compiled from.

    Args:
        folder: the artifact.
        dtype: compute dtype: of activations and of the unpacked rest. By default the model's own,
            but float32 instead of float16, which CPUs compute slowly.
        verify: compare every tensor with its checksum first.

    Raises:
        SourceError: not an artifact, damaged, of a newer format, or not of a transformers model.
    """
    artifact = Artifact.open(Path(folder))
    if verify:
        artifact.verify()
    config = artifact.folder / "config.json"
    if not config.exists():
        raise SourceError(
            f"{folder}: holds the weights of a plain module, without a config.json; build the module "
            "and use kbitc.load_into(module, folder)"
        )
    register()
    data = read_json(config)
    model_class = _model_class(data, config)
    with quiet_transformers():
        model: nn.Module = model_class.from_pretrained(artifact.folder, dtype=dtype or compute_dtype(data))
    return model.eval()


def _model_class(config: dict[str, Any], path: Path) -> Any:
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise SourceError(
            f"{path}: transformers {transformers.__version__} has no model class '{names[0]}'; "
            "install the version that the model was made with"
        )
    return model_class


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
    if verify:
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
