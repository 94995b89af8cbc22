"""The compiled model on disk: a folder with packed safetensors, the plan and a checksum per tensor.

The one thing to know: nothing appears under its final name before it is complete. Tensors are
written straight to their place in files of known size (a spec and a shape give every byte count), in
``.NAME.partial`` beside the target, with a journal that ``--resume`` continues; one rename ends it
(`kbitc.artifact.folders`).

For a weight ``W`` the file holds ``W.planes``, ``W.scales`` and whichever of ``W.zeros``,
``W.scale_absmax``, ``W.scale_mean``, ``W.outlier_values``, ``W.outlier_index``, ``W.codebook`` its spec
asks for (`kbitc.formats.packed.Packed`); codebooks that weights share stand once, as
``kbit.codebook.NAME``; every other tensor keeps its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbitc.artifact.folders import FORMAT, FolderClaim
from kbitc.checkpoint.folder_checks import INDEX
from kbitc.checkpoint.safetensors_file import DTYPES
from kbitc.checkpoint.tensor_digests import tensor_bytes
from kbitc.errors import SourceError, UsageError
from kbitc.formats.layout import Slot
from kbitc.system.checksums import SEAL, check_seal, digest, digest_of_part, digests_in, sealed
from kbitc.system.json_file import parse, read_limited, well_formed

SHARD_BYTES = 4 * 2**30

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes an artifact; use as a context manager and call :meth:`commit` at the end.

    On an error the partial folder is removed; on an interrupt (Ctrl-C) or a kill it stays, so that
    ``resume=True`` with the same identity goes on where it stopped.

    Args:
        out: the final folder.
        slots: every tensor that will be written: unit name to its tensors by stored name. A unit is
            what one :meth:`put` writes.
        identity: source, plan and versions; a partial folder of another identity is not resumed.
        is_forced: replace an existing ``out``.
        is_resumed: continue a partial folder, if one is there.
        claim: on ``out``, with the same two options, by a caller who holds it already.

    Raises:
        UsageError: ``out`` exists (without force), cannot be written, is being written by another process,
            or was begun with another identity; or a tensor has a dtype that safetensors does not know.
    """

    def __init__(
        self,
        out: Path,
        slots: Mapping[str, Mapping[str, Slot]],
        identity: Mapping[str, Any],
        *,
        is_forced: bool = False,
        is_resumed: bool = False,
        claim: FolderClaim | None = None,
    ) -> None:
        _check_dtypes(slots)
        self.out = out
        self.slots = slots
        self.files = _split(slots)
        self.done: dict[str, dict[str, Any]] = {}
        self.checksums: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._place = {key: (file, offset) for file in self.files for key, offset in file.offsets.items()}
        header = {"identity": json.loads(json.dumps(identity)), "format": FORMAT}
        self._own = None
        if claim is None:
            claim = self._own = FolderClaim(
                out, is_forced=is_forced, is_resumed=is_resumed, is_resumable=True
            )
        self.claim = claim
        self.journal = claim.state / "journal.jsonl"
        try:
            if not (is_resumed and self._resume(header)):
                self._start(header)
            self._log = self.journal.open("a", encoding="utf-8")
        except BaseException as error:
            if self._own is not None:
                self._own.close(type(error))
            raise

    @property
    def partial(self) -> Path:
        """The folder to fill."""
        return self.claim.new

    def _start(self, header: Mapping[str, Any]) -> None:
        try:
            folder = self.claim.begin()
            for file in self.files:
                with (folder / file.name).open("wb") as handle:
                    if file.size:
                        os.posix_fallocate(handle.fileno(), 0, file.size)
            self.journal.write_text(json.dumps(sealed(header)) + "\n", encoding="utf-8")
        except OSError as error:
            size = sum(file.size for file in self.files)
            raise UsageError(
                f"{self.out}: cannot be written: {error.strerror or error}. The artifact takes "
                f"{size / 1e6:.1f} MB; nothing was written. Free space or choose another -o folder"
            ) from error

    def _resume(self, header: Mapping[str, Any]) -> bool:
        """Take over what an interrupted run has done; False if it did not get as far as its journal."""
        entries, length = _journaled(self.journal)
        if not entries:
            return False
        if entries[0] != sealed(header):
            raise UsageError(
                f"{self.claim.state}: was begun with another source, plan or kbitc version, so --resume "
                "cannot continue it; run again without --resume to start over"
            )
        try:
            folder = self.claim.go_on()
            if not self.claim.is_placed and any(
                (folder / file.name).stat().st_size != file.size for file in self.files
            ):
                return False
        except OSError:  # files that are no files among them
            return False
        with well_formed(str(self.journal), "run again without --resume to start over", UsageError):
            for entry in entries[1:]:
                if self.claim.is_placed or self._is_there(entry):
                    self._note(entry)
        os.truncate(self.journal, length)
        return True

    def _is_there(self, entry: Mapping[str, Any]) -> bool:
        """Whether the files hold what the journal says of a unit, which a power failure may undo."""
        for key, (checksum, _) in entry["tensors"].items():
            file, offset = self._place[key]
            if digest_of_part(self.partial / file.name, offset, file.slots[key].nbytes) != checksum:
                return False
        return True

    def _note(self, entry: dict[str, Any]) -> None:
        self.done[entry["unit"]] = {key: value for key, value in entry.items() if key != SEAL}
        for key, (checksum, dtype) in entry["tensors"].items():
            self.checksums[key] = checksum
            self.dtypes[key] = getattr(torch, dtype)

    def put(self, unit: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write all tensors of a unit, then journal them.

        Args:
            unit: a key of ``slots``.
            tensors: by stored name; exactly the unit's, of their slots' sizes.
            note: JSON values to keep with the unit, found again in ``done``.
        """
        expected = self.slots[unit]
        assert set(tensors) == set(expected), (unit, set(tensors) ^ set(expected))
        entry: dict[str, Any] = {"unit": unit, "tensors": {}, **note}
        for key, tensor in tensors.items():
            assert tensor.shape == expected[key].shape, (key, tensor.shape, expected[key].shape)
            assert tensor.dtype.itemsize == expected[key].dtype.itemsize, (key, tensor.dtype)
            file, offset = self._place[key]
            data = tensor_bytes(tensor)
            with (self.partial / file.name).open("r+b") as handle:
                handle.seek(offset)
                handle.write(data)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry["tensors"][key] = [digest(data), dtype]
        self._log.write(json.dumps(sealed(entry)) + "\n")
        self._log.flush()
        self._note(entry)

    def get(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a unit that is done, by stored name."""
        tensors = {}
        for key, slot in self.slots[unit].items():
            file, offset = self._place[key]
            data = bytearray(slot.nbytes)
            with (self.partial / file.name).open("rb") as handle:
                handle.seek(offset)
                handle.readinto(data)
            tensors[key] = torch.frombuffer(data, dtype=self.dtypes[key]).view(slot.shape)
        return tensors

    def digests(self) -> dict[str, str]:
        """SHA-256 of the header of every file of tensors and of everything else in the folder, by name."""
        missing = set(self.slots) - set(self.done)
        assert not missing, f"not written: {sorted(missing)[:3]}"
        own = {file.name: digest(file.header(self.dtypes)) for file in self.files}
        index = self._index()
        if index is not None:
            own[INDEX] = digest(index.encode())
        return digests_in(self.partial, own) | own

    def _index(self) -> str | None:
        if len(self.files) == 1:
            return None
        index = {
            "metadata": {"total_size": sum(file.payload for file in self.files)},
            "weight_map": {key: self._place[key][0].name for key in sorted(self._place)},
        }
        return json.dumps(index, indent=1)

    def commit(self, documents: Mapping[str, str]) -> None:
        """Write the headers and the given text files, then move the folder to its final name."""
        missing = set(self.slots) - set(self.done)
        assert not missing, f"not written: {sorted(missing)[:3]}"
        if not self.claim.is_placed:
            for file in self.files:
                with (self.partial / file.name).open("r+b") as handle:
                    handle.write(file.header(self.dtypes))
                    os.fsync(handle.fileno())
        index = self._index()
        if index is not None:
            documents = {**documents, INDEX: index}
        for name, text in documents.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        self._log.close()
        self.claim.put_in_place()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._log.close()
        if error is not None and not isinstance(error, Exception) and self.claim.is_resumable:
            error.add_note("what was packed is kept: run the same command with --resume to go on")
        if self._own is not None:
            self._own.close(kind)
        if isinstance(error, OSError):
            raise UsageError(
                f"{self.out}: cannot be written: {error.strerror or error}; nothing was written"
            ) from error


def _journaled(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal, and the bytes that they take.

    A kill may cut the last line short: what that told of is written again, and so is what follows on a line
    that does not match its checksum.
    """
    entries, length = [], 0
    for line in read_limited(journal).splitlines(keepends=True) if journal.exists() else []:
        try:
            entry = parse(line if line.endswith(b"\n") else b"", str(journal))
            check_seal(entry if isinstance(entry, dict) else {}, str(journal), "")
        except SourceError:
            break
        entries.append(entry)
        length += len(line)
    return entries, length


@dataclass(frozen=True)
class _File:
    """One safetensors file: where each tensor lies in it."""

    name: str
    slots: Mapping[str, Slot]
    offsets: Mapping[str, int]
    header_bytes: int

    @property
    def payload(self) -> int:
        return sum(slot.nbytes for slot in self.slots.values())

    @property
    def size(self) -> int:
        return self.header_bytes + self.payload

    def header(self, dtypes: Mapping[str, torch.dtype]) -> bytes:
        """Length and JSON, padded with spaces to the size that was kept free."""
        text = self.header_text(dtypes)
        return (self.header_bytes - 8).to_bytes(8, "little") + text.ljust(self.header_bytes - 8)

    def header_text(self, dtypes: Mapping[str, torch.dtype]) -> bytes:
        """The JSON alone."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", "kbit_format": str(FORMAT)}}
        for key, slot in self.slots.items():
            start = self.offsets[key] - self.header_bytes
            entries[key] = {
                "dtype": _NAMES[dtypes.get(key, slot.dtype)],
                "shape": list(slot.shape),
                "data_offsets": [start, start + slot.nbytes],
            }
        return json.dumps(entries, separators=(",", ":")).encode()


def _check_dtypes(slots: Mapping[str, Mapping[str, Slot]]) -> None:
    for unit in slots.values():
        for key, slot in unit.items():
            if slot.dtype not in _NAMES:
                raise UsageError(
                    f"{key}: is of {str(slot.dtype).removeprefix('torch.')}, which a safetensors file cannot "
                    "hold; register it with persistent=False, or store it in another dtype (torch.complex64 "
                    "for complex numbers)"
                )


def _split(slots: Mapping[str, Mapping[str, Slot]]) -> list[_File]:
    """Files of at most ``SHARD_BYTES`` (a larger unit gets its own), units in order."""
    groups: list[dict[str, Slot]] = [{}]
    size = 0
    for unit in slots.values():
        unit_bytes = sum(slot.nbytes for slot in unit.values())
        if groups[-1] and size + unit_bytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1].update(unit)
        size += unit_bytes
    if len(groups) == 1:
        return [_lay_out("model.safetensors", groups[0])]
    count = len(groups)
    return [
        _lay_out(f"model-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, start=1)
    ]


def _lay_out(name: str, slots: Mapping[str, Slot]) -> _File:
    # Widest dtypes first, so that every tensor is aligned to its own item size.
    ordered = dict(sorted(slots.items(), key=lambda item: -item[1].dtype.itemsize))
    widest = {
        key: torch.bfloat16 if slot.dtype == torch.float16 else slot.dtype for key, slot in ordered.items()
    }
    # Room for the header, measured with the longest offsets and dtype names that it can hold.
    total = sum(slot.nbytes for slot in ordered.values())
    draft = _File(name, ordered, dict.fromkeys(ordered, total), 0)
    room = 8 + -(-len(draft.header_text(widest)) // 8) * 8
    offsets, position = {}, room
    for key, slot in ordered.items():
        offsets[key] = position
        position += slot.nbytes
    return _File(name, ordered, offsets, room)
