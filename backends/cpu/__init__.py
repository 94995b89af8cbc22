"""The backend "cpu": a model's decode step, native, or compiled once by AOTInductor and kept.

`Cpu` is offered here; the decoders, the native program and the packages on disk lie in files of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.backends.cpu.backend import Cpu

__all__ = ["Cpu"]

__getattr__, __dir__ = exports(__name__, {"Cpu": "kbitc.backends.cpu.backend"})
