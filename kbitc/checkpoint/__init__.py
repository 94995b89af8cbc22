"""Source models, read one tensor at a time: the first box of the pipeline.

The one thing to know: nothing here runs code that comes with a model, unpickles, or holds more of
the model in memory than the tensor in hand.
"""

from __future__ import annotations

from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
