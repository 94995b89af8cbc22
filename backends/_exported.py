"""What every exported folder holds beside its model: a report, sealed, with the checksums of all files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from kbitc.artifact.folders import FolderClaim
from kbitc.artifact.plan_file import WeightEntry
from kbitc.artifact.reader import Artifact
from kbitc.checkpoint.folder_checks import inside
from kbitc.errors import SourceError, UsageError
from kbitc.system import files
from kbitc.system.checksums import SEAL, check_seal, digest_of_file, digests_in, sealed
from kbitc.system.json_file import mapping, read_json, well_formed

REPORT = "kbit_export.json"
DIGESTS = "checksums"
ADVICE = "copy it again or export the model again"
COMPRESSED = "compressed-tensors"
"""The kind of a folder that vLLM and transformers load; of other kinds ONNX Runtime does."""
LISTED = 20  # weights that an error names

IsHeld: TypeAlias = Callable[[str, WeightEntry], bool]


def check_formats(artifact: Artifact, is_held: IsHeld, program: str, instead: str) -> None:
    """Refuse what another program has no format for, with the weights' own.

    Args:
        artifact: to be exported.
        is_held: whether a weight is, by its name and entry.
        program: that is to hold them.
        instead: what it holds, and how to get that.

    Raises:
        UsageError: lists the weights that are not.
    """
    bad = [
        f"{name}: {entry.spec}" for name, entry in artifact.plan.packed.items() if not is_held(name, entry)
    ]
    if bad:
        listed = "\n  ".join(bad[:LISTED]) + (f"\n  ... and {len(bad) - LISTED} more" * (len(bad) > LISTED))
        raise UsageError(
            f"{artifact.folder}: {len(bad)} weights are in formats that {program} does not hold:\n  "
            f"{listed}\n{instead}"
        )


@contextmanager
def filling(claim: FolderClaim) -> Iterator[Path]:
    """The folder to fill; nothing appears under its name before it is complete.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        yield claim.begin()
        claim.put_in_place()
    except OSError as error:
        raise UsageError(
            f"{claim.shown}: cannot be written: {error.strerror or error}; nothing was written"
        ) from error


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """The last file of a folder: it has the checksums of all others."""
    write_json(folder / REPORT, sealed({**report, DIGESTS: digests_in(folder)}))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """One small file."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def exported_kind(folder: Path) -> str:
    """The kind of an exported folder; "" of any other.

    Raises:
        SourceError: it has a report that is damaged.
    """
    path = folder / REPORT
    if not files.exists(path):
        return ""
    report = read_json(path)
    with well_formed(str(path), ADVICE):
        return str(mapping(report, "a report")["kind"])


def verify_exported(folder: Path, report: Mapping[str, Any]) -> int:
    """Compare the report and every file that it names with their checksums; how many files that is.

    Exports of earlier versions have none: of those only the sizes are compared.

    Raises:
        SourceError: names the first file that differs.
    """
    path = folder / REPORT
    with well_formed(str(path), ADVICE):
        digests = mapping(report.get(DIGESTS, {}), DIGESTS)
        if DIGESTS in report or SEAL in report:
            check_seal(report, str(path), ADVICE)
        for name, size in mapping(report["files"], "files").items():
            file = inside(folder, name, str(folder))
            if not file.is_file() or file.stat().st_size != size:
                raise SourceError(f"{file}: is missing, or not of {size} bytes; {ADVICE}")
        for name, wanted in digests.items():
            if digest_of_file(inside(folder, name, str(folder))) != wanted:
                raise SourceError(
                    f"{folder / name}: does not match its checksum: it was changed or damaged; {ADVICE}"
                )
    return len(digests)
