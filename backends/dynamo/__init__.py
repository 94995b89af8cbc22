"""The backend "kbit" of torch.compile: graphs of Dynamo on packed weights.

torch finds `kbit` by the entry point that pyproject.toml declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.backends.dynamo.backend import kbit

__all__ = ["kbit"]

__getattr__, __dir__ = exports(__name__, {"kbit": "kbitc.backends.dynamo.backend"})
