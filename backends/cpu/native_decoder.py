"""`NativeDecoder`: prompts and tokens through a native step, which no compiler has to make."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.backends._decoding.cache import CacheFormat, GrowingCache, PackedCache, PlainCache
from kbitc.backends._decoding.decoder import layer_count
from kbitc.backends.cpu.generating import StepDecoder
from kbitc.backends.cpu.native_keeping import kept_step
from kbitc.backends.cpu.native_lowering import lower
from kbitc.backends.cpu.native_program import NativeProgram
from kbitc.backends.cpu.native_trace import export_tokens
from kbitc.backends.cpu.native_values import Unknown
from kbitc.errors import UsageError, first_line
from kbitc.formats.codebooks import shared_codebook
from kbitc.graph.program import Program, Stage
from kbitc.kernels.cpu.build import load
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import Fired, records

PLAIN = (torch.float16, torch.float32)
AT_ONCE = 512  # tokens of a prompt that go through the model together


class NativeDecoder(StepDecoder):
    """Decodes with a native step, which is made in a second or a few, and kept.

    Attributes:
        model: as given.
        passes: that lowered the step.
        program: the step.
        fusions: what those passes did and left.

    Raises:
        UsageError: see `StepDecoder`; `Unknown` for a model that native steps cannot say, with the reason.
    """

    name = "cpu"
    reads_prompts = True
    kv = PlainCache(torch.float16)

    def __init__(self, model: nn.Module, passes: Sequence[Pass] | None = None) -> None:
        super().__init__(model)
        if not load():
            raise Unknown("the native kernels are not there")
        self.passes = tuple(lowering_pipeline() if passes is None else passes)
        self.program, self.fusions = kept_step(model, self.passes, lambda: native_step(model, self.passes))
        self._native = self.program.build()
        weakref.finalize(self, torch.ops.kbit.free_step, self._native)

    def new_cache(self, room: int = 0) -> GrowingCache:
        """See `Decoder.new_cache`."""
        cache = GrowingCache(len(self.program.slots) // 2, max(1, room), self.kv)
        pairs = zip(self.program.slots[::2], self.program.slots[1::2], strict=True)
        for layer, ((heads, key_size), (_, value_size)) in zip(cache.growing, pairs, strict=True):
            layer.allocate(heads, key_size, value_size, torch.float32)
        return cache

    def _why_no_cache(self, kv: CacheFormat) -> str | None:
        del kv
        return None

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        self._check_weights()
        cache = self.new_cache(len(ids))
        parts = [part.contiguous() for part in ids.split(AT_ONCE)]
        return torch.cat([self.run(part, cache, range(len(part))) for part in parts])

    def spent(self) -> dict[str, float]:
        """Seconds since the last call of this: in products, in attention, in what lies between."""
        seconds = torch.ops.kbit.step_spent(self._native)
        return dict(zip(("products", "attention", "between"), seconds, strict=True))

    def _step(self, ids: Tensor, cache: GrowingCache) -> Tensor:
        tokens = ids.shape[1]
        for first in range(0, tokens, AT_ONCE):
            some = ids[0, first : first + AT_ONCE].contiguous()
            is_last = first + len(some) == tokens
            logits = self.run(some, cache, [len(some) - 1] if is_last else [])
        return logits

    def run(self, ids: Tensor, cache: GrowingCache, wanted: Sequence[int]) -> Tensor:
        """Append tokens to a cache.

        Args:
            ids: (tokens) int64, contiguous.
            cache: of `new_cache`.
            wanted: which of the tokens' logits to give, rising.

        Returns:
            (wanted, vocabulary) float32.

        Raises:
            IndexError: a token that the model does not have; the cache is as before.
        """
        start, count = cache.growing[0].length, len(ids)
        slots = cache.addresses(count)
        positions = torch.arange(start, start + count)
        codebooks, numbers = _kept_as(cache)
        try:
            logits: Tensor = torch.ops.kbit.run_step(
                self._native, ids, positions, slots, [start], [count], list(wanted), codebooks, numbers
            )
        except BaseException:
            cache.crop(-count)
            raise
        return logits


def _kept_as(cache: GrowingCache) -> tuple[list[Tensor], list[int]]:
    """A cache as ``kbit::run_step`` takes it.

    Codebooks, bits, block sizes and whether there are zero points of keys and of values; or plain bits.
    """
    kv = cache.format
    if isinstance(kv, PackedCache):
        both = (kv.keys, kv.values)
        numbers = [(spec.bits, spec.block, int(spec.has_zero_point)) for spec in both]
        return [shared_codebook(spec) for spec in both], [*numbers[0], *numbers[1]]
    dtype = (kv.dtype if isinstance(kv, PlainCache) else None) or cache.growing[0].dtype
    if dtype not in PLAIN:
        raise UsageError(f"the native step takes caches of float16, float32 or k bits, not of {dtype}")
    return [], [8 * dtype.itemsize]


def native_step(model: nn.Module, passes: Sequence[Pass]) -> tuple[NativeProgram, dict[str, Fired]]:
    """The step of a model, and what the passes recorded.

    Args:
        model: causal language model of transformers with packed weights, on the CPU.
        passes: what runs on the traced graph.

    Raises:
        Unknown: it computes what native steps cannot.
    """
    layers = layer_count(model)
    try:
        exported, tensors = export_tokens(model, layers)
    except Unknown:
        raise
    except Exception as error:
        raise Unknown(
            f"torch.export cannot trace it ({type(error).__name__}: {first_line(error)})"
        ) from error
    inputs: dict[str, Any] = {
        spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None
    }
    traced = Program(exported.graph_module, inputs, stage=Stage.PACKED)
    lowered = PassManager(passes).run(traced)
    given = {name: tensors[target] for name, target in lowered.parameters.items()}
    program = lower(lowered.graph.graph, given)
    if len(program.slots) != 2 * layers:
        raise Unknown("layers share keys and values, or have none")
    return program, records(lowered)
