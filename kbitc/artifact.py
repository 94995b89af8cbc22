"""The compiled model on disk: a folder with packed safetensors, the plan and a checksum per tensor.

The one thing to know: nothing appears under its final name before it is complete. Tensors are
written straight to their place in files of known size (a spec and a shape give every byte count), in
``.NAME.partial`` beside the target, with a journal that ``--resume`` continues; one rename ends it.

For a weight ``W`` the file holds ``W.planes``, ``W.scales`` and whichever of ``W.zeros``,
``W.scale_absmax``, ``W.scale_mean``, ``W.outlier_values``, ``W.outlier_index``, ``W.codebook`` its spec
asks for (`kbitc.blockwise.Packed`); codebooks that weights share stand once, as
``kbit.codebook.NAME``; every other tensor keeps its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbitc import datatypes
from kbitc.blockwise import TENSOR_FIELDS, Packed
from kbitc.errors import SourceError, UsageError
from kbitc.slots import SCALE_MAP, SHARED, Slot
from kbitc.spec import Spec, parse
from kbitc.tensor import KbitTensor

FORMAT = 1
PLAN_FILE = "kbit_plan.json"
SHARD_BYTES = 4 * 2**30

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stored_tensors(packed: Packed) -> dict[str, Tensor]:
    """The tensors of a packed weight that stand in the file under its own name, by field."""
    own = packed.tensors()
    own.pop("scale_codebook", None)
    if not datatypes.FAMILIES[packed.spec.family].is_fitted:
        own.pop("codebook")
    return own


def assemble(
    parts: Mapping[str, Tensor],
    spec: Spec,
    shape: tuple[int, ...],
    shared: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    is_transposed: bool,
) -> KbitTensor:
    """Inverse of :func:`stored_tensors`: a tensor of the logical ``shape`` and ``dtype``."""
    fields: dict[str, Tensor | None] = {name: parts.get(name) for name in TENSOR_FIELDS}
    if fields["codebook"] is None:
        fields["codebook"] = shared[SHARED + spec.codebook_name]
    if spec.has_double_quant:
        fields["scale_codebook"] = shared[SCALE_MAP]
    in_features = shape[-2] if is_transposed else shape[-1]
    packed = Packed(**fields, spec=spec, in_features=in_features)  # type: ignore[arg-type]
    return KbitTensor(packed, dtype, is_transposed=is_transposed)


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)


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
        is_resumed: continue a partial folder.

    Raises:
        UsageError: ``out`` exists (without force), cannot be written, or nothing matches to resume.
        SourceError: the disk is full.
    """

    def __init__(
        self,
        out: Path,
        slots: Mapping[str, Mapping[str, Slot]],
        identity: Mapping[str, Any],
        *,
        is_forced: bool = False,
        is_resumed: bool = False,
    ) -> None:
        check_target(out, is_forced=is_forced)
        self.out = out
        self.partial = out.parent / f".{out.name}.partial"
        self.journal = self.partial / "journal.jsonl"
        self.slots = slots
        self.files = _split(slots)
        self.done: dict[str, dict[str, Any]] = {}
        self.checksums: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._place = {key: (file, offset) for file in self.files for key, offset in file.offsets.items()}
        header = {"identity": json.loads(json.dumps(identity)), "format": FORMAT}
        if is_resumed and self.partial.exists():
            self._resume(header)
        else:
            self._start(header)
        self._log = self.journal.open("a", encoding="utf-8")

    def _start(self, header: Mapping[str, Any]) -> None:
        try:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
            for file in self.files:
                with (self.partial / file.name).open("wb") as handle:
                    if file.size:
                        os.posix_fallocate(handle.fileno(), 0, file.size)
        except OSError as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            size = sum(file.size for file in self.files)
            raise UsageError(
                f"{self.out}: cannot be written: {error.strerror or error}. The artifact takes "
                f"{size / 1e6:.1f} MB; nothing was written. Free space or choose another -o folder"
            ) from error
        self.journal.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def _resume(self, header: Mapping[str, Any]) -> None:
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that the kill cut short, and its tensor, are written again
        if not entries or entries[0] != header:
            raise UsageError(
                f"{self.partial}: was begun with another source, plan or kbitc version, so --resume "
                "cannot continue it; run again without --resume to start over"
            )
        for entry in entries[1:]:
            self._note(entry)
        body = "".join(json.dumps(entry) + "\n" for entry in entries)
        self.journal.write_text(body, encoding="utf-8")

    def _note(self, entry: dict[str, Any]) -> None:
        self.done[entry["unit"]] = entry
        for key, (digest, dtype) in entry["tensors"].items():
            self.checksums[key] = digest
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
            data = _bytes(tensor)
            with (self.partial / file.name).open("r+b") as handle:
                handle.seek(offset)
                handle.write(data)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry["tensors"][key] = [hashlib.sha256(data).hexdigest(), dtype]
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()
        self._note(entry)

    def commit(self, documents: Mapping[str, str]) -> None:
        """Write the headers and the given text files, then move the folder to its final name."""
        missing = set(self.slots) - set(self.done)
        assert not missing, f"not written: {sorted(missing)[:3]}"
        for file in self.files:
            with (self.partial / file.name).open("r+b") as handle:
                handle.write(file.header(self.dtypes))
                os.fsync(handle.fileno())
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": sum(file.payload for file in self.files)},
                "weight_map": {key: self._place[key][0].name for key in sorted(self._place)},
            }
            documents = {**documents, "model.safetensors.index.json": json.dumps(index, indent=1)}
        for name, text in documents.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        self._log.close()
        self.journal.unlink()
        replace_folder(self.partial, self.out)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._log.close()
        # An interrupt keeps what is done for --resume; an error leaves nothing behind.
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(
                f"{self.out}: cannot be written: {error.strerror or error}; nothing was written"
            ) from error


def check_target(out: Path, *, is_forced: bool, marker: str = PLAN_FILE) -> None:
    """Refuse early what :class:`Writer` could not finish.

    Args:
        out: the folder to be written.
        is_forced: it may exist, if it is one of ours.
        marker: the file that ours hold.

    Raises:
        UsageError: the folder exists and is not an artifact to replace, or its parent is not writable.
    """
    if out.exists() and not is_forced:
        raise UsageError(f"{out}: exists already; pass --force to replace it, or choose another -o")
    if out.exists() and not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: is not a kbitc artifact (it holds no {marker}), so --force will not replace it; remove "
            "it yourself or choose another -o"
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{out}: {parent} is not a writable folder; choose another -o")


def replace_folder(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an old ``out`` is moved aside first and removed last."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


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
                "dtype": _DTYPES[dtypes.get(key, slot.dtype)],
                "shape": list(slot.shape),
                "data_offsets": [start, start + slot.nbytes],
            }
        return json.dumps(entries, separators=(",", ":")).encode()


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


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk, opened and checked.

    Attributes:
        folder: where it lies.
        plan: the contents of ``kbit_plan.json``.
        files: its safetensors files, by the tensors in them.
    """

    folder: Path
    plan: Mapping[str, Any]
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the plan and every header.

        Raises:
            SourceError: not an artifact, of a newer format, truncated, or a tensor is missing.
        """
        path = folder / PLAN_FILE
        if not path.is_file():
            raise SourceError(
                f"{folder}: not a compiled model: it holds no {PLAN_FILE}. Compile one with "
                "'kbitc compile MODEL --bits 4 -o OUT'"
            )
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            version, checksums = plan["format"], plan["checksums"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{path}: damaged ({error}); compile the model again") from error
        if not isinstance(version, int) or version > FORMAT:
            raise SourceError(
                f"{folder}: artifact format {version} (written by kbitc {plan.get('kbitc', '?')}), but "
                f"this kbitc reads up to {FORMAT}; upgrade kbitc"
            )
        files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as handle:
                    files.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise SourceError(
                    f"{file}: truncated or damaged ({error}); copy it again or compile the model again"
                ) from error
        missing = sorted(set(checksums) - set(files))
        if missing:
            raise SourceError(
                f"{folder}: {len(missing)} tensors are missing, the first is '{missing[0]}'; copy the "
                "whole folder again or compile the model again"
            )
        return cls(folder, plan, files)

    @property
    def specs(self) -> dict[str, Spec]:
        """The spec of every packed weight."""
        parsed = {name: parse(entry["spec"]) for name, entry in self.plan["weights"].items()}
        return {name: spec for name, spec in parsed.items() if not spec.is_left_alone}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return int(self.plan["bytes"])

    @property
    def bits_per_param(self) -> float:
        """Stored bits per parameter of the source model, tied ones counted once."""
        return 8 * self.payload_bytes / int(self.plan["parameters"])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, one file at a time."""
        for file in sorted(set(self.files.values())):
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  # not a dict
                    yield key, handle.get_tensor(key)

    def verify(self) -> None:
        """Compare every tensor with its checksum.

        Raises:
            SourceError: names the first tensor that differs.
        """
        expected = self.plan["checksums"]
        for key, tensor in self.tensors():
            if expected.get(key) != checksum(tensor):
                raise SourceError(
                    f"{self.files[key]}: tensor '{key}' does not match its checksum: the file was "
                    "changed or damaged; copy it again or compile the model again"
                )

    def shared(self) -> dict[str, Tensor]:
        """The shared codebooks, by stored name."""
        return read_shared(set(self.files.values()))

    def state(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All weights by parameter name: packed ones as ``KbitTensor``, the rest as stored.

        Args:
            dtype: logical dtype of packed weights, and dtype of the other floats; by default the
                source's.
        """
        shared = self.shared()
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.specs}
        state: dict[str, Tensor] = {}
        for key, tensor in self.tensors():
            owner, _, leaf = key.rpartition(".")
            if owner in parts and leaf in TENSOR_FIELDS:
                parts[owner][leaf] = tensor
            elif not key.startswith(SHARED):
                is_cast = dtype is not None and tensor.is_floating_point()
                state[key] = tensor.to(dtype) if is_cast else tensor
        for name, spec in self.specs.items():
            entry = self.plan["weights"][name]
            state[name] = assemble(
                parts[name],
                spec,
                tuple(entry["shape"]),
                shared,
                dtype or getattr(torch, entry["dtype"]),
                is_transposed=entry["is_transposed"],
            )
        return state


def read_shared(files: Iterable[Path]) -> dict[str, Tensor]:
    """The shared codebooks in these safetensors files, by stored name."""
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  # not a dict
                if key.startswith(SHARED):
                    found[key] = handle.get_tensor(key)
    return found
