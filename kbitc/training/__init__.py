"""Training: what is learned after packing (scales, codebooks, norms, codes), adapters, int8 layers.

The first changes no format of an artifact; adapters lie over packed weights, which stay as they are; int8
layers are for models whose weights are not packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.training.adapting import prepare_for_training
    from kbitc.training.int8_layers import switchback

__all__ = ["prepare_for_training", "switchback"]

__getattr__, __dir__ = exports(
    __name__,
    {"prepare_for_training": "kbitc.training.adapting", "switchback": "kbitc.training.int8_layers"},
)
