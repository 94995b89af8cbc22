"""An artifact read back: opened, checked, and its tensors put together as weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbitc.artifact.folders import PLAN_FILE
from kbitc.artifact.plan_file import PlanFile
from kbitc.artifact.stored import assemble, checksum
from kbitc.checkpoint.folder_checks import check_regular
from kbitc.errors import SourceError
from kbitc.formats.layout import SHARED
from kbitc.formats.packed import TENSOR_FIELDS
from kbitc.formats.spec import Spec


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk, opened and checked.

    Attributes:
        folder: where it lies.
        plan: the contents of ``kbit_plan.json``.
        files: its safetensors files, by the tensors in them.
    """

    folder: Path
    plan: PlanFile
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
        check_regular(folder, str(folder))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SourceError(f"{path}: damaged ({error}); compile the model again") from error
        plan = PlanFile.from_json(data, path)
        files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as handle:
                    files.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise SourceError(
                    f"{file}: truncated or damaged ({error}); copy it again or compile the model again"
                ) from error
        missing = sorted(set(plan.checksums) - set(files))
        if missing:
            raise SourceError(
                f"{folder}: {len(missing)} tensors are missing, the first is '{missing[0]}'; copy the "
                "whole folder again or compile the model again"
            )
        return cls(folder, plan, files)

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
        expected = self.plan.checksums
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
        for name, entry in self.plan.packed.items():
            state[name] = assemble(
                parts[name],
                entry.spec,
                entry.shape,
                shared,
                dtype or entry.dtype,
                is_transposed=entry.is_transposed,
                view_of=entry.view_of,
            )
        return state


def read_shared(files: Iterable[Path]) -> dict[str, Tensor]:
    """The shared codebooks in these safetensors files, by stored name."""
    codebooks: dict[str, Tensor] = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  # not a dict
                if key.startswith(SHARED):
                    codebooks[key] = handle.get_tensor(key)
    return codebooks
