"""Tensors that took long to make and are kept in the cache, checked when they are read back."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from kbitc.cache import check_private, make_private
from kbitc.checkpoint.kept_tensors import read_tensors, write_tensors
from kbitc.errors import BackendUnavailable, SourceError

_log = logging.getLogger(__name__)


def kept(path: Path, make: Callable[[], Mapping[str, Tensor]], what: str) -> Mapping[str, Tensor]:
    """What an earlier run kept there, or what ``make`` gives, kept; nothing is written before it is whole.

    Args:
        path: in a folder of the cache folder; its name says all that the result depends on.
        make: called where there is no file, or a damaged one, or where others could have written it.
        what: is not kept, for the warning in the last case: "what calibration measures".
    """
    try:
        make_private(path.parent)
        if path.exists():
            check_private(path)
            with contextlib.suppress(SourceError):  # damaged: it is made and written again
                return read_tensors(path)
    except (OSError, BackendUnavailable) as error:
        _log.warning("%s. %s is not kept", error, what)
        return make()
    made = make()
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        scratch = Path(folder) / path.name
        write_tensors(made, scratch)
        scratch.chmod(0o600)
        scratch.replace(path)
    return made
