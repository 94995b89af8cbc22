"""Layers to train with few bits: int8 products, and an embedding that 8-bit optimizers hold steady.

They take the place of torch's own and hold the same parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.nn.stable_embedding import StableEmbedding
    from kbitc.nn.switchback import SwitchBackLinear

__all__ = ["StableEmbedding", "SwitchBackLinear"]

__getattr__, __dir__ = exports(
    __name__,
    {"StableEmbedding": "kbitc.nn.stable_embedding", "SwitchBackLinear": "kbitc.nn.switchback"},
)
