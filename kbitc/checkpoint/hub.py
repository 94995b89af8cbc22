"""A hub id, ``org/name`` or ``org/name@revision``: downloaded once, then read as a folder.

The one thing to know: only configs, tokenizer files and safetensors are fetched; what is in the cache
is used without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

from kbitc.checkpoint.hf_folder import COMPANIONS, PICKLES, HfFolder, pickle_message
from kbitc.errors import SourceError

PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
WANTED = [*COMPANIONS, "*.safetensors", "*.safetensors.index.json"]


def open_hub(name: str) -> HfFolder:
    """Download (or find in the cache) and read a model of the hub.

    Raises:
        SourceError: no such model, no access, no network, or no safetensors in it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=WANTED)
    except GatedRepoError as error:
        raise SourceError(
            f"{name}: access to this model must be asked for on its page; then log in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{name}: neither a local path nor a model of the hub; check the spelling, or log in with "
            "'hf auth login' if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{name}: the model has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{name}: not a local path, not in the download cache, and the hub cannot be reached; check "
            "the spelling and the network"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{name}: downloading failed: {str(error).splitlines()[0]}") from error
    path = Path(folder)
    if (path / "config.json").is_file() and not list(path.glob("*.safetensors")):
        try:
            files = HfApi().list_repo_files(repo, revision=revision or None)
        except (HfHubHTTPError, OSError):
            files = []
        pickled = next((file for file in files if file.endswith(PICKLES)), None)
        if pickled is not None:
            raise SourceError(pickle_message(name, pickled))
    return HfFolder(path, name)
