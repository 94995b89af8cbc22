"""Tensors that are kept in a file of our own and read back, with a checksum of all that they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kbitc.checkpoint.safetensors_file import header_bytes, read_header
from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.errors import SourceError
from kbitc.system.json_file import MALFORMED, parse

_KEY = "sha256"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, contiguous and each in memory of its own.

    Raises:
        OSError: the file cannot be written.
    """
    save_file(dict(tensors), path, {_KEY: digest_of_tensors(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote.

    Raises:
        SourceError: it cannot be read, or is not what was written.
    """
    try:
        tensors = {name: stored.read() for name, stored in read_header(path).items()}
        wanted = parse(header_bytes(path)[0][8:], str(path))["__metadata__"][_KEY]
    except MALFORMED as error:
        raise SourceError(f"{path}: has no checksum") from error
    if wanted != digest_of_tensors(tensors):
        raise SourceError(f"{path}: does not match its checksum")
    return tensors
