"""The CPU: a causal language model's tokens through one native step, or one that AOTInductor compiles.

before:  one Python call of every module a token
after:   a flat list of native operations, run by one team of threads, prompts too; packed weights stay
         where they are

The one thing to know: an operation that the native list does not know sends the whole step to AOTInductor,
which needs a C++ compiler and a minute once (`step_package`); `CompiledDecoder.why_compiled` is the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from kbitc.backends._compiler import missing_compiler
from kbitc.errors import KbitcError
from kbitc.kernels.cpu.build import load
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline

if TYPE_CHECKING:
    from kbitc.backends.cpu.generating import StepDecoder


@dataclass(frozen=True)
class Cpu:
    """Lowers the decode step; everything else runs as it is.

    Attributes:
        passes: what lowers the step instead of `kbitc.pipeline.LOWERING`, as values or names.
        disabled: names of lowering passes to leave out.
        is_native: whether to try a native step before a compiled one.
    """

    passes: tuple[Pass | str, ...] | None = None
    disabled: tuple[str, ...] = ()
    is_native: bool = True

    def missing(self) -> str | None:
        """A compiler, unless native kernels or a step compiled before are there: both may be enough."""
        missing = missing_compiler()
        if missing is None or (self.is_native and load()):
            return None
        from kbitc.backends.cpu.step_package import kept_packages

        return None if kept_packages() else missing

    def decoder(self, model: nn.Module) -> StepDecoder:
        """A `NativeDecoder`, or where the model computes what that cannot a `CompiledDecoder`.

        Raises:
            UsageError: also for unknown or misplaced lowering passes.
            BackendUnavailable: it has to be compiled, and that needs something to be installed.
        """
        from kbitc.backends.cpu.compiled_decoder import CompiledDecoder
        from kbitc.backends.cpu.native_decoder import NativeDecoder
        from kbitc.backends.cpu.native_values import Unknown

        passes = lowering_pipeline(self.passes, self.disabled)
        if not self.is_native:
            return CompiledDecoder(model, passes)
        try:
            return NativeDecoder(model, passes)
        except Unknown as error:
            why = str(error)
        try:
            return CompiledDecoder(model, passes, why)
        except KbitcError as error:
            raise type(error)(f"{error} (no native step: {why})") from error


BACKEND = Cpu
