"""The header of a GGUF file: its scalar metadata and where its tensors lie.

The one thing to know: ``gguf.GGUFReader`` makes a numpy array of every token of the vocabulary (2 s
for 49 thousand of them); this walks past arrays, takes milliseconds, and checks the file's size.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.safetensors_file import read_bytes
from kbitc.errors import SourceError
from kbitc.system.json_file import AGAIN, MALFORMED, shape

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letters
STRING, ARRAY = 8, 9
MOST = 1 << 24  # of anything that a header lists: keys, tensors, tokens, bytes of a text
MAX_DIMENSIONS = 8
DEEPEST = 4  # arrays in arrays
CHUNK = 1 << 22  # elements dequantized at once: their float32 form, 16 MB, stays near the cache


@dataclass(frozen=True)
class Block:
    """A tensor of the file.

    Attributes:
        path: the file.
        offset: from the file's start.
        nbytes: in the file.
        kind: number of its ``gguf.GGMLQuantizationType``.
        info: dequantized.
    """

    path: Path
    offset: int
    nbytes: int
    kind: int
    info: TensorInfo

    def read(self) -> Tensor:
        """The tensor, dequantized some rows at a time."""
        from gguf import GGMLQuantizationType, quants

        raw = read_bytes(self.path, self.offset, self.nbytes)
        if self.kind in _plain():
            return raw.view(self.info.dtype).reshape(self.info.shape)
        *lead, width = self.info.shape
        rows = raw.reshape(torch.Size(lead).numel(), -1).numpy()
        dense = torch.empty((len(rows), width), dtype=self.info.dtype)
        step = max(1, CHUNK // width)
        for start in range(0, len(rows), step):
            part = quants.dequantize(rows[start : start + step], GGMLQuantizationType(self.kind))
            dense[start : start + step] = torch.from_numpy(part)
        return dense.reshape(self.info.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        metadata: scalars and strings by key; no arrays.
        blocks: tensors by name.
    """

    metadata: dict[str, object]
    blocks: dict[str, Block]

    @staticmethod
    def of(path: Path, label: str) -> Header:
        """Read the header of a file.

        Raises:
            SourceError: not a GGUF file, truncated, or one that cannot be read here.
        """
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise SourceError(f"{label}: is a pipe, socket or device, no file; give a file")
            with path.open("rb") as handle:
                if handle.read(4) != MAGIC:
                    raise SourceError(f"{label}: is not a GGUF file, as it does not start like one; {AGAIN}")
                return _read(_Cursor(handle, about.st_size), path, label)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (EOFError, *MALFORMED) as error:
            raise SourceError(f"{label}: its header is cut off or damaged ({error!r}); {AGAIN}") from error


class _Cursor:
    """Reads little-endian values from a file, and never past its end."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self.handle, self.size = handle, size

    def numbers(self, form: str) -> tuple[int, ...]:
        raw = self.bytes(struct.calcsize(f"<{form}"))
        return struct.unpack(f"<{form}", raw)

    def bytes(self, count: int) -> bytes:
        raw = self.handle.read(count) if count <= self.size else b""
        if len(raw) < count:
            raise EOFError(f"{count} bytes wanted, {len(raw)} left")
        return raw

    def skip(self, count: int) -> None:
        if count > self.size - self.handle.tell():
            raise EOFError(f"{count} bytes wanted, {self.size - self.handle.tell()} left")
        self.handle.seek(count, os.SEEK_CUR)

    def count(self, form: str, nbytes: int) -> int:
        """How many things follow, each of at least ``nbytes`` bytes."""
        (count,) = self.numbers(form)
        left = self.size - self.handle.tell()
        if count > min(left // nbytes, MOST):
            raise EOFError(f"{count} of something in {left} bytes")
        return count

    def text(self) -> str:
        return self.bytes(self.count("Q", 1)).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> object:
        """A scalar or string; None for an array, which is walked past."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.numbers(SCALARS[kind])[0]
        (inner,) = self.numbers("I")
        if depth == DEEPEST:
            raise EOFError(f"arrays in arrays, deeper than {DEEPEST}")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            self.skip(self.count("Q", width) * width)
            return None
        for _ in range(self.count("Q", 8 if inner == STRING else 12)):
            self.skip(self.count("Q", 1)) if inner == STRING else self.value(inner, depth + 1)
        return None


def _read(cursor: _Cursor, path: Path, label: str) -> Header:
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "of big-endian byte order" if swapped else f"of GGUF version {version}"
        raise SourceError(f"{label}: is {what}; kbitc reads little-endian files of version 2 and 3")
    tensors, entries = cursor.count("Q", 24), cursor.count("Q", 13)
    metadata: dict[str, object] = {}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    places: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensors):
        name = cursor.text()
        count = cursor.count("I", 8)
        if count > MAX_DIMENSIONS:
            raise ValueError(f"'{name}' has {count} dimensions")
        dims = shape(list(reversed(cursor.numbers(f"{count}Q"))), f"'{name}'")
        kind, offset = cursor.numbers("IQ")
        places.append((name, dims, kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.handle.tell() // alignment) * alignment
    blocks = {
        name: _block(path, label, name, dims, kind, start + offset) for name, dims, kind, offset in places
    }
    end = max((block.offset + block.nbytes for block in blocks.values()), default=0)
    if cursor.size < end:
        raise SourceError(
            f"{label}: is truncated, {cursor.size} of {end} bytes; {AGAIN} (an unfinished download "
            "looks like this)"
        )
    return Header(metadata, blocks)


def _plain() -> dict[int, torch.dtype]:
    from gguf import GGMLQuantizationType as Kind

    return {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


def _block(path: Path, label: str, name: str, dims: tuple[int, ...], kind: int, offset: int) -> Block:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    known = {int(member): member.name for member in GGMLQuantizationType}
    plain = _plain()
    if kind not in plain and kind not in quants._type_traits:
        raise SourceError(
            f"{label}: '{name}' is stored as {known.get(kind, f'type {kind}')}, which the "
            "installed gguf package cannot dequantize; upgrade it, or take a file of another "
            "quantization"
        )
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if 0 in dims or (dims or (1,))[-1] % elements:
        raise ValueError(f"'{name}' of shape {dims} in blocks of {elements}")
    info = TensorInfo.of(dims, plain.get(kind, torch.float16))
    return Block(path, offset, math.prod(dims) // elements * nbytes, kind, info)
