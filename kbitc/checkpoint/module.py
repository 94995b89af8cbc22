"""A module in memory: its own parameters are the source, and it is never changed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo, stored_names


class InMemory:
    """Reader of one module, which must hold real data."""

    def __init__(self, module: nn.Module) -> None:
        self.label = type(module).__name__
        self.module = module
        state = module.state_dict(keep_vars=True)
        self._tensors: dict[str, Tensor] = {name: state[name].detach() for name in stored_names(module)}

    def skeleton(self) -> nn.Module:
        """See :class:`Checkpoint`."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        memo: dict[int, Any] = {}
        for tensor in tensors:
            empty = tensor.detach().to("meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return copy.deepcopy(self.module, memo).eval()

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See :class:`Checkpoint`."""
        return {
            name: TensorInfo(tuple(t.shape), t.dtype, t.numel() * t.dtype.itemsize)
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """See :class:`Checkpoint`."""
        return self._tensors[name]

    def fingerprint(self) -> str:
        """See :class:`Checkpoint`: a hash of all data, since nothing else identifies it."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            raw = tensor.cpu().contiguous().flatten().view(torch.uint8)
            array: Any = raw.numpy()
            digest.update(memoryview(array))
        return digest.hexdigest()

    def save_companions(self, folder: Path) -> None:
        """See :class:`Checkpoint`."""
        config: Any = getattr(self.module, "config", None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
        generation: Any = getattr(self.module, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(folder)

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *_: object) -> None:
        pass
