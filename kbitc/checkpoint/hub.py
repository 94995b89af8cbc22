"""A hub id, ``org/name`` or ``org/name@revision``: downloaded into the cache, read as a folder.

The one thing to know: the config comes first, alone, so that a model which cannot be compiled is
refused before its weights are fetched; pickled weights and code are never fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kbitc.checkpoint import companions
from kbitc.checkpoint.folder_checks import check_folder, pickle_message
from kbitc.checkpoint.hf_folder import HfFolder
from kbitc.errors import SourceError, first_line
from kbitc.system.json_file import read_json

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^\s@]+))?", re.ASCII)
WEIGHTS = ["model.safetensors", "model-*.safetensors"]


def open_hub(label: str, revision: str | None = None) -> HfFolder:
    """Download, or find in the cache, and read a model of the hub.

    Args:
        label: matches ``HUB_ID``.
        revision: branch, tag or commit; the id's own if None.

    Raises:
        SourceError: no such model or revision, no access, no network, or no safetensors.
    """
    match = HUB_ID.fullmatch(label)
    assert match is not None, label
    repo, revision = match["repo"], revision or match["revision"]
    small = [companions.CONFIG, *companions.patterns(), "model.safetensors.index.json"]
    folder = _snapshot(label, repo, revision, small)
    check_folder(folder, label)
    # The folder is named by its commit: a push between the two downloads cannot mix two models.
    _snapshot(label, repo, folder.name, [*WEIGHTS, *companions.named_in(folder)])
    if not any(folder.glob("model*.safetensors")):
        config = folder / companions.CONFIG
        raise SourceError(
            f"{pickle_message(label, 'it has no model.safetensors', read_json(config))}. "
            "Many models have converted weights at the revision refs/pr/1 of their page's "
            "discussions"
        )
    return HfFolder(folder, label)


def _snapshot(label: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(f"{label}: {_reason(error, revision)}") from error


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        error = error.__cause__  # the hub answered, but with an error
    reasons: dict[Any, str] = {  # subclasses first
        errors.GatedRepoError: (
            "access to this model has to be asked for: accept its terms on its hub page, then log "
            "in with 'hf auth login'"
        ),
        errors.RepositoryNotFoundError: (
            "is neither a local path nor a model of the hub; check the spelling, or log in with "
            "'hf auth login' if it is private"
        ),
        errors.RevisionNotFoundError: (
            f"the model has no revision '{revision}'; its branches and tags are on its hub page"
        ),
        errors.LocalEntryNotFoundError: (
            "is not a local path, not in the download cache, and the hub cannot be reached; check "
            "the spelling and the network (HF_HUB_OFFLINE, HF_ENDPOINT), or download it elsewhere "
            "and give the folder"
        ),
        errors.HFValidationError: f"is neither a local path nor a hub id: {first_line(error)}.",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    return (
        f"downloading it failed: {first_line(error)}. Try again, or download it elsewhere and give the folder"
    )
