"""The CPU: a model's decode step, compiled once by AOTInductor, kbit ops called without Python.

before:  one Python call of every module a token
after:   one call of a shared library a token; packed weights stay where they are (user-managed
         constants), so that the package is small and loading it copies nothing

The one thing to know: a package depends on the architecture, the formats and the machine, never on the
weights' values, and serves every length. It is kept under ``$KBITC_CACHE/decode`` (by default
``~/.cache/kbitc/decode``) and not beside the artifact, which may be read-only or on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from kbitc.backends._compiler import missing_compiler
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline

if TYPE_CHECKING:
    from kbitc.backends.cpu.compiled_decoder import CompiledDecoder


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
        """A compiler, unless a step that was compiled before is kept: that may be the one that is wanted."""
        missing = missing_compiler()
        if missing is None:
            return None
        from kbitc.backends.cpu.step_package import kept_packages

        return None if kept_packages() else missing

    def decoder(self, model: nn.Module) -> CompiledDecoder:
        """See `CompiledDecoder`.

        Raises:
            UsageError: also for unknown or misplaced lowering passes.
        """
        from kbitc.backends.cpu.compiled_decoder import CompiledDecoder

        return CompiledDecoder(model, lowering_pipeline(self.passes, self.disabled))


BACKEND = Cpu
