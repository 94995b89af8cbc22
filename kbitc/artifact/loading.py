"""Models from artifacts: load and load_into.

The one thing to know: loading goes through transformers' own ``from_pretrained`` with the ``kbit``
quantizer, so that what comes back is the Hugging Face model with packed parameters, nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kbitc.artifact.reader import Artifact
from kbitc.artifact.transformers_quantizer import register
from kbitc.checkpoint.dense import compute_dtype, quiet_transformers
from kbitc.checkpoint.json_file import read_json
from kbitc.checkpoint.skeletons import load_config, model_classes
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
    wanted = dtype or compute_dtype(read_json(config))
    model_class = model_classes(load_config(artifact.folder, str(folder)), str(folder))[0]
    with quiet_transformers():
        model: nn.Module = model_class.from_pretrained(
            artifact.folder, dtype=wanted, trust_remote_code=False
        )
    return model.eval()


def load_into(module: nn.Module, folder: str | Path, *, verify: bool = True) -> nn.Module:
    """Put an artifact's weights into a module of the same structure.

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
    state: dict[str, Tensor] = artifact.state()
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
    return module
