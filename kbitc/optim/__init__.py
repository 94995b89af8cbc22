"""Optimizers whose states are block-wise dynamic codes of 8 or 4 bits, in memory or in paged files.

They are `torch.optim.Optimizer` and take the place of those of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.optim.rules import Adam8bit, AdamW8bit, Lion8bit, SGD8bit, StableAdamW

__all__ = ["Adam8bit", "AdamW8bit", "Lion8bit", "SGD8bit", "StableAdamW"]

__getattr__, __dir__ = exports(__name__, dict.fromkeys(__all__, "kbitc.optim.rules"))
