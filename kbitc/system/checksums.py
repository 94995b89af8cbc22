"""Checksums of files and of JSON, and the fingerprint of a model's files.

The one thing to know: they find damage and mix-ups; whoever can write a file can write its checksum too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbitc.errors import SourceError
from kbitc.system import files

SEAL = "sha256"
"""The key of the checksum of everything else in a JSON object."""
CHUNK = 2**22  # bytes that are read at once
WHOLE = 16 * 2**20  # bytes of a file that is hashed whole
SAMPLES, SAMPLE = 4, 4096  # of a tensor of a longer one: spread evenly, and so many bytes each


def digest(raw: bytes | bytearray | memoryview) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(raw).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        SourceError: it cannot be read.
    """
    with files.reading(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_of_part(path: Path, offset: int, nbytes: int) -> str:
    """SHA-256 of some bytes of a file, or of those that are there.

    Raises:
        SourceError: it cannot be read.
    """
    total, left = hashlib.sha256(), nbytes
    with files.reading(path) as handle:
        handle.seek(offset)
        while left and (part := handle.read(min(CHUNK, left))):
            total.update(part)
            left -= len(part)
    return total.hexdigest()


def digests_in(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every file of a folder and the folders in it, by its path from there."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: digest_of_file(names[name]) for name in sorted(set(names) - set(leave_out))}


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its values, which the layout of a file does not change.

    >>> sealed({"a": 1})["sha256"][:8]
    '015abd7f'
    """
    return {**data, SEAL: _of_values(data)}


def check_seal(data: Mapping[str, Any], label: str, advice: str) -> None:
    """See that an object is as :func:`sealed` left it.

    Raises:
        SourceError: it is not, or has no checksum.
    """
    if data.get(SEAL) != _of_values(data):
        raise SourceError(f"{label}: does not match its checksum: it was changed or damaged; {advice}")


def _of_values(data: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in data.items() if key != SEAL}
    return digest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def fingerprint(spans: Mapping[Path, Sequence[tuple[int, int]]], *texts: bytes) -> str:
    """What tells the contents of model files apart, however they are called and whenever they were written.

    Files of up to ``WHOLE`` bytes count whole. Of longer ones count the header and samples of each tensor: a
    fine-tuned tensor differs nearly everywhere.

    Args:
        spans: by file, in order, offset and bytes of each tensor.
        texts: what counts beside them.

    Raises:
        SourceError: a file cannot be read.
    """
    total = hashlib.sha256()
    for text in texts:
        total.update(digest(text).encode())
    for file, places in spans.items():
        total.update(_sampled(file, places).encode())
    return total.hexdigest()


def _sampled(file: Path, places: Sequence[tuple[int, int]]) -> str:
    with files.reading(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size <= WHOLE:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        parts = hashlib.sha256(size.to_bytes(8, "little"))
        parts.update(handle.read(min((offset for offset, _ in places), default=0)))
        for offset, nbytes in places:
            step = max(SAMPLE, (nbytes - SAMPLE) // (SAMPLES - 1))
            for start in range(0, nbytes, step):
                handle.seek(offset + start)
                parts.update(handle.read(min(SAMPLE, nbytes - start)))
    return parts.hexdigest()
