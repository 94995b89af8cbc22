"""An artifact like another one, with other values in some of its tensors.

The one thing to know: what the plan says of formats, and every other file that it names, are taken over as
they are; only values, their checksums and what the plan says of how they came about are new.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kbitc.artifact.folders import PLAN_FILE, FolderClaim
from kbitc.artifact.plan_file import PlanFile
from kbitc.artifact.reader import Artifact
from kbitc.artifact.writer import Writer
from kbitc.checkpoint.folder_checks import INDEX
from kbitc.formats.layout import Slot
from kbitc.graph.context import Progress, silent
from kbitc.system.checksums import sealed
from kbitc.version import VERSION


def write_replaced(
    artifact: Artifact,
    tensors: Mapping[str, Tensor],
    plan: PlanFile,
    claim: FolderClaim,
    on_progress: Progress = silent,
) -> None:
    """Write an artifact beside or in place of another.

    Args:
        artifact: to be like.
        tensors: new values by stored name, of the same shapes and sizes.
        plan: of the same formats; checksums and the version are put in.
        claim: on the folder to write, which may be the artifact's own.
        on_progress: told of each tensor.

    Raises:
        UsageError: the folder cannot be written.
        SourceError: a file of the artifact is gone or has changed.
    """
    slots = {
        name: {name: Slot(tensors[name].dtype if name in tensors else there.info.dtype, there.info.shape)}
        for name, there in artifact.stored.items()
    }
    with Writer(claim.shown, slots, {"replaced": artifact.plan.source}, claim=claim) as writer:
        for i, (name, there) in enumerate(artifact.stored.items()):
            writer.put(name, {name: tensors[name] if name in tensors else there.read()}, {})
            on_progress(f"writing {name}", i + 1, len(slots))
        for name in _others(artifact):
            (writer.partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.folder / name, writer.partial / name)
        written = replace(plan, checksums=writer.checksums, files=writer.digests(), kbitc=VERSION)
        writer.commit({PLAN_FILE: json.dumps(sealed(written.to_json()), indent=1) + "\n"})


def _others(artifact: Artifact) -> list[str]:
    """The files beside tensors and plan that the plan names; where it names none, all that lie there."""
    own = {*(file.name for file in artifact.files), PLAN_FILE, INDEX}
    known = artifact.plan.files
    if known is None:
        paths = (path for path in artifact.folder.rglob("*") if path.is_file())
        known = {path.relative_to(artifact.folder).as_posix(): "" for path in paths}
    return sorted({*known} - own)
