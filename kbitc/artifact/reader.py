"""An artifact read back: opened, checked, and its tensors put together as weights.

The one thing to know: its files are those that transformers would load, found by the same rule, and no other
file of tensors may lie beside them, so that what is verified is what is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.plan_file import PlanFile
from kbitc.artifact.stored import assemble
from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.folder_checks import INDEX, WHOLE, check_regular, inside
from kbitc.checkpoint.safetensors_file import Stored, header_bytes, read_header
from kbitc.errors import SourceError
from kbitc.formats.layout import SHARED, Slot, packed_slots, shared_codebooks
from kbitc.formats.packed import TENSOR_FIELDS
from kbitc.formats.spec import Spec
from kbitc.system import files as file_system
from kbitc.system.checksums import SEAL, check_seal, digest, digest_of_file, digest_of_part
from kbitc.system.json_file import read_json, well_formed
from kbitc.system.large_pages import LargePages

ADVICE = "copy it again or compile the model again"
THREADS = 4
OF_THE_MODEL = ("config.json", "generation_config.json", INDEX)
"""Files that decide what the model computes, beside its tensors."""


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk, opened and checked.

    Attributes:
        folder: where it lies.
        plan: the contents of ``kbit_plan.json``.
        stored: where every tensor lies, by stored name.
    """

    folder: Path
    plan: PlanFile
    stored: Mapping[str, Stored]

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the plan and every header.

        Raises:
            SourceError: not an artifact, of a newer format, truncated, or its tensors are not the plan's.
        """
        path = folder / PLAN_FILE
        if not file_system.exists(path):
            raise SourceError(
                f"{folder}: not a compiled model: it holds no {PLAN_FILE}. Compile one with "
                "'kbitc compile MODEL --bits 4 -o OUT'"
            )
        check_regular(folder, str(folder))
        try:
            data = read_json(path)
        except SourceError as error:
            raise SourceError(f"{error}, or compile the model again") from error
        plan = PlanFile.from_json(data, path)
        stored: dict[str, Stored] = {}
        for file in _weight_files(folder):
            header = read_header(file)
            twice = sorted(stored.keys() & header.keys())
            if twice:
                raise SourceError(f"{file}: holds '{twice[0]}', which another file holds too; {ADVICE}")
            stored |= header
        _check_names(folder, plan, stored)
        with well_formed(str(path), "compile the model again"):
            _check_slots(folder, plan, stored)
        return cls(folder, plan, stored)

    @property
    def files(self) -> list[Path]:
        """Its safetensors files."""
        return sorted({stored.file for stored in self.stored.values()})

    @property
    def specs(self) -> dict[str, Spec]:
        """The spec of every packed weight."""
        return {name: entry.spec for name, entry in self.plan.packed.items()}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return self.plan.nbytes

    @property
    def bits_per_param(self) -> float:
        """Stored bits per parameter of the source model, tied ones counted once."""
        return self.plan.bits_per_param

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, one at a time, as they lie in the files."""
        for name, stored in self.stored.items():
            yield name, stored.read()

    def verify(self, *, is_whole: bool = False) -> None:
        """Compare everything that decides what the model computes with its checksum.

        That is the plan, the model's configuration, and name, dtype, shape and bytes of every tensor. Of
        artifacts of earlier versions, whose plan has fewer checksums, it is what it has.

        Args:
            is_whole: every other file that was written too: tokenizer, processor, score table.

        Raises:
            SourceError: names the first thing that differs.
        """
        path = self.folder / PLAN_FILE
        data = read_json(path)
        if self.plan.files is not None or SEAL in data:
            check_seal(data, str(path), ADVICE)
            self._verify_files(is_whole=is_whole)
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            for (name, stored), found in zip(
                self.stored.items(), pool.map(_digest, self.stored.values()), strict=True
            ):
                if self.plan.checksums[name] != found:
                    raise SourceError(
                        f"{stored.file}: tensor '{name}' does not match its checksum: the file was changed "
                        f"or damaged; {ADVICE}"
                    )

    def _verify_files(self, *, is_whole: bool) -> None:
        known = self.plan.files or {}
        own = {file.name: file for file in self.files}
        added = [
            name for name in (*own, *OF_THE_MODEL) if name not in known and (self.folder / name).exists()
        ]
        if added:
            raise SourceError(f"{self.folder / added[0]}: did not belong to this artifact; remove it")
        for name, wanted in known.items():
            if name not in own and name not in OF_THE_MODEL and not is_whole:
                continue
            file = inside(self.folder, name, str(self.folder))
            found = digest(header_bytes(file)[0]) if name in own else digest_of_file(file)
            if found != wanted:
                what = f"{file}: its header" if name in own else f"{file}: it"
                raise SourceError(f"{what} does not match its checksum: it was changed or damaged; {ADVICE}")

    def shared(self) -> dict[str, Tensor]:
        """The shared codebooks, by stored name."""
        return {name: stored.read() for name, stored in self.stored.items() if name.startswith(SHARED)}

    def state(self, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
        """All weights by parameter name: packed ones as ``KbitTensor``, the rest as stored.

        Args:
            dtypes: logical dtypes of packed weights by name; by default the source's.
        """
        shared = self.shared()
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.specs}
        state: dict[str, Tensor] = {}
        pages = LargePages()
        for key, tensor in self.tensors():
            owner, _, leaf = key.rpartition(".")
            if owner in parts and leaf in TENSOR_FIELDS:
                parts[owner][leaf] = tensor
            elif not key.startswith(SHARED):
                state[key] = tensor
        for name, entry in self.plan.packed.items():
            state[name] = assemble(
                parts[name],
                entry.spec,
                entry.shape,
                shared,
                (dtypes or {}).get(name, entry.dtype),
                is_transposed=entry.is_transposed,
                view_of=entry.view_of,
                pages=pages,
            )
            parts[name].clear()
        return state


def read_shared(files: Iterable[Path]) -> dict[str, Tensor]:
    """The shared codebooks in these safetensors files, by stored name."""
    return {
        name: stored.read()
        for file in sorted(files)
        for name, stored in read_header(file).items()
        if name.startswith(SHARED)
    }


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, and no others may be there."""
    label = str(folder)
    if (folder / WHOLE).exists():
        files = [inside(folder, WHOLE, label)]
    elif (folder / INDEX).exists():
        with well_formed(str(folder / INDEX), ADVICE):
            names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
            files = [inside(folder, name, label) for name in names]
    else:
        raise SourceError(
            f"{folder}: its tensors are missing: it holds neither {WHOLE} nor {INDEX}; {ADVICE}"
        )
    others = sorted({*folder.glob("*.safetensors")} - {*files})
    others += [path for path in (folder / "adapter_config.json",) if path.exists()]
    if others:
        raise SourceError(
            f"{others[0]}: does not belong to this artifact, but may be loaded in place of what does; "
            "move it to a folder of its own"
        )
    return files


def _check_names(folder: Path, plan: PlanFile, stored: Mapping[str, Stored]) -> None:
    missing, more = (
        sorted(plan.checksums.keys() - stored.keys()),
        sorted(stored.keys() - plan.checksums.keys()),
    )
    if missing:
        raise SourceError(
            f"{folder}: {len(missing)} tensors are missing, the first is '{missing[0]}'; copy the "
            "whole folder again or compile the model again"
        )
    if more:
        raise SourceError(
            f"{stored[more[0]].file}: holds '{more[0]}', which its plan does not name; {ADVICE}"
        )


def _check_slots(folder: Path, plan: PlanFile, stored: Mapping[str, Stored]) -> None:
    """Every tensor has the dtype and shape that the plan asks for."""
    wanted = {key: Slot(t.dtype, tuple(t.shape)) for key, t in _codebooks(plan).items()}
    for name, entry in plan.packed.items():
        *lead, rows, columns = entry.view_of or entry.shape
        rows, columns = (columns, rows) if entry.is_transposed else (rows, columns)
        for field, slot in packed_slots(entry.spec, (*lead, rows), columns).items():
            wanted[f"{name}.{field}"] = slot
    dims = {name: rest.shape for name, rest in plan.left_alone.items()}
    dims |= {name: entry.shape for name, entry in plan.weights.items() if entry.spec.is_left_alone}
    for name in wanted.keys() | dims.keys():
        if name not in stored:
            raise SourceError(f"{folder}: the tensor '{name}' is missing, which the plan asks for; {ADVICE}")
    for name, there in stored.items():
        is_right = _fits(there.info, wanted[name]) if name in wanted else dims.get(name) == there.info.shape
        if not is_right:
            raise SourceError(
                f"{there.file}: '{name}' is {there.info.dtype} of shape {there.info.shape}, which its plan "
                f"does not ask for; {ADVICE}"
            )


def _codebooks(plan: PlanFile) -> dict[str, Tensor]:
    return shared_codebooks(entry.spec for entry in plan.packed.values())


def _fits(info: TensorInfo, slot: Slot) -> bool:
    """See `kbitc.formats.layout.Slot`: a 16-bit float takes both kinds."""
    both = (torch.float16, torch.bfloat16)
    is_known = info.dtype == slot.dtype or (info.dtype in both and slot.dtype in both)
    return is_known and info.shape == slot.shape


def _digest(stored: Stored) -> str:
    return digest_of_part(stored.file, stored.offset, stored.info.nbytes)
