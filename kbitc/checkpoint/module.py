"""A module in memory: its own parameters are the source, and it is never changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint import companions
from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.checkpoint.names import stored_names, tensor_of
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.errors import SourceError, UsageError

PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class InMemory(Checkpoint):
    """Reader of one module.

    Raises:
        UsageError: a tensor holds no data, or is packed already.
        SourceError: the module cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.label = type(module).__name__
        self.module = module
        self._tensors = {name: tensor_of(module, name) for name in stored_names(module)}
        for name, tensor in self._tensors.items():
            _check(self.label, name, tensor)
        self._skeleton = _on_meta(module, self.label)

    def skeleton(self) -> nn.Module:
        """See `Checkpoint`."""
        return self._skeleton

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint`."""
        return {name: TensorInfo.of(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; shares memory with the module where that is on the CPU."""
        return self._tensors[name].detach().cpu()

    def transient(self, name: str) -> Tensor | None:
        """See `Checkpoint`."""
        return tensor_of(self.module, name).detach().cpu()

    def fingerprint(self) -> str:
        """See `Checkpoint`; a hash of all data, since nothing else tells two modules apart."""
        return digest_of_tensors(self._tensors)

    def save_companions(self, folder: Path) -> None:
        """See `Checkpoint`; a module without a transformers config has none."""
        config: Any = getattr(self.module, "config", None)
        if hasattr(config, "to_json_string"):
            data = {**json.loads(config.to_json_string()), "architectures": [self.label]}
            companions.write_config(data, folder)
        generation: Any = getattr(self.module, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(folder)


def _check(label: str, name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise UsageError(f"{label}: '{name}' has no shape yet; run the module once before compiling it")
    if type(tensor) not in PLAIN:
        raise UsageError(
            f"{label}: '{name}' is a {type(tensor).__name__}, not a plain tensor: the model is "
            "packed, quantized or distributed already; compile the model that it was made from"
        )
    if tensor.is_meta:
        raise UsageError(f"{label}: '{name}' is on the meta device and holds no data; load the weights first")
    if is_freed(tensor):
        raise UsageError(
            f"{label}: the data of '{name}' was freed, as torch.compile(model, backend='kbit') does with "
            "free_source; load the model again, or compile it with the same options as before"
        )


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no memory behind it; reading it may crash the process."""
    return not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _on_meta(module: nn.Module, label: str) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor):
                # Neither parameter nor buffer: shared, as deepcopy refuses tensors with a history.
                memo.setdefault(id(value), value.detach())
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise SourceError(
            f"{label}: the module cannot be copied ({error}); remove what cannot be, such as open "
            "files, locks or hooks that hold them"
        ) from error
