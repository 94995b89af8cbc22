"""Source models, read one tensor at a time, by the model's own names.

Nothing here runs code that comes with a model, unpickles, or holds more of it than the tensor in hand.
"""

from __future__ import annotations

from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
