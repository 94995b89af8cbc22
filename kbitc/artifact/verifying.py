"""Whether what is loaded is compared with its checksums: by default, unless somebody says otherwise.

The one thing to know: ``kbitc.load(..., verify=False)`` is for one model, ``KBITC_VERIFY=off`` for a process,
``from_pretrained`` and the command line included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from kbitc.artifact.folders import PLAN_FILE, is_artifact
from kbitc.artifact.reader import ADVICE, Artifact
from kbitc.errors import SourceError
from kbitc.system import files as file_system

VARIABLE = "KBITC_VERIFY"
OFF = ("off", "0", "no", "false")

_IS_DONE: ContextVar[bool] = ContextVar("is_done", default=False)


def is_wanted() -> bool:
    """Whether anything is to be verified here, in this thread."""
    return not _IS_DONE.get() and os.environ.get(VARIABLE, "").lower() not in OFF


@contextmanager
def done() -> Iterator[None]:
    """Here, in this thread, nothing is to be verified (again)."""
    token = _IS_DONE.set(True)
    try:
        yield
    finally:
        _IS_DONE.reset(token)


def verify_files(files: Sequence[Path], config: Any) -> None:
    """Verify the artifact that transformers is about to load.

    Args:
        files: the safetensors files that it will read.
        config: of the model; says where it came from.

    Raises:
        SourceError: there is no plan to compare with, or something differs.
    """
    folder = files[0].parent
    if not is_artifact(folder):
        _fetch_plan(folder, config)
    with torch.device("cpu"):  # transformers calls under the meta device
        artifact = Artifact.open(folder)
    if {*files} != {*artifact.files}:
        raise SourceError(
            f"{folder}: other files are loaded than those of the artifact: "
            f"{', '.join(sorted(file.name for file in files))}; {ADVICE}"
        )
    artifact.verify()


def _fetch_plan(folder: Path, config: Any) -> None:
    """Of a model of the hub transformers downloads only what it reads itself."""
    from transformers.utils.hub import cached_file

    repository = getattr(config, "_name_or_path", "")
    found = None
    if repository and not file_system.exists(Path(repository)):
        try:
            found = cached_file(repository, PLAN_FILE, revision=getattr(config, "_commit_hash", None))
        except OSError as error:
            raise SourceError(
                f"{repository}: its {PLAN_FILE}, which has the checksums, cannot be fetched: {error}; load "
                f"it unverified with {VARIABLE}=off"
            ) from error
    if found is None or Path(found).parent != folder:
        raise SourceError(
            f"{folder}: holds no {PLAN_FILE}, which has the checksums; copy it too, or load the model "
            f"unverified with {VARIABLE}=off"
        )
