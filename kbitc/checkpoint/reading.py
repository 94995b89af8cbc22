"""`Reading`: a source's tensors by name, also in another process.

The one thing to know: pickled, it is the name of the source and its fingerprint; where it is unpickled the
source is opened again by that name, at the first tensor that is read.
"""

from __future__ import annotations

from torch import Tensor

from kbitc.checkpoint.base import Checkpoint
from kbitc.checkpoint.opening import open_checkpoint
from kbitc.errors import SourceError, UsageError


class Reading:
    """``checkpoint.read`` that can be pickled.

    Args:
        checkpoint: open for as long as this process reads.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint: Checkpoint | None = checkpoint
        self._label = checkpoint.label
        self._fingerprint = ""

    def __call__(self, name: str) -> Tensor:
        """One tensor, see `Checkpoint.read`.

        Raises:
            SourceError: the source cannot be opened here, or is another one here.
        """
        if self._checkpoint is None:
            self._checkpoint = self._opened()
        return self._checkpoint.read(name)

    def _opened(self) -> Checkpoint:
        checkpoint = open_checkpoint(self._label)
        if checkpoint.fingerprint() != self._fingerprint:
            raise SourceError(
                f"{self._label}: is another model here than where this compilation was begun; all machines "
                "must see the same files under the same names"
            )
        return checkpoint

    def __getstate__(self) -> dict[str, object]:
        from kbitc.checkpoint.module import InMemory

        if isinstance(self._checkpoint, InMemory):
            raise UsageError(
                f"{self._label}: is a module in memory, which other processes do not see; save it in a "
                "folder (save_pretrained), and give that"
            )
        fingerprint = self._fingerprint if self._checkpoint is None else self._checkpoint.fingerprint()
        return {"_checkpoint": None, "_label": self._label, "_fingerprint": fingerprint}
