"""SHA-256 of tensors: of the bytes of one, or of all that several are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbitc.system.checksums import digest


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU."""
    raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)


def digest_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return digest(tensor_bytes(tensor))


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; of no order that they are given in."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()
