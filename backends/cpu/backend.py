"""The CPU: a model's decode step, compiled once by AOTInductor, kbit ops called without Python.

before:  one Python call of every module a token
after:   one call of a shared library a token; packed weights stay where they are (user-managed
         constants), so that the package is small and loading it copies nothing

The one thing to know: a package depends on the architecture, the formats and the machine, never on the
weights' values, and serves every length. It is kept under ``$KBITC_CACHE/decode`` (by default
``~/.cache/kbitc/decode``) and not beside the artifact, which may be read-only or on another machine.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from torch import nn

from kbitc.backends.cpu.compiled_decoder import CompiledDecoder
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline


@dataclass(frozen=True)
class Cpu:
    """Compiles the decode step; everything else runs as it is.

    Attributes:
        passes: what lowers the step instead of `kbitc.pipeline.LOWERING`, as values or names.
        disabled: names of lowering passes to leave out.
    """

    passes: tuple[Pass | str, ...] | None = None
    disabled: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What to install; None if nothing."""
        named = os.environ.get("CXX")
        if any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"])):
            return None
        return "no C++ compiler was found; install g++ or clang++, or name one in CXX"

    def decoder(self, model: nn.Module) -> CompiledDecoder:
        """See `CompiledDecoder`.

        Raises:
            UsageError: also for unknown or misplaced lowering passes.
        """
        return CompiledDecoder(model, lowering_pipeline(self.passes, self.disabled))


BACKEND = Cpu
