"""Training: what is learned after packing (scales, zero points, codebooks, norms, codes), and int8 layers.

The first changes no format of an artifact; the second is for models whose weights are not packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.training.int8_layers import switchback

__all__ = ["switchback"]

__getattr__, __dir__ = exports(__name__, {"switchback": "kbitc.training.int8_layers"})
