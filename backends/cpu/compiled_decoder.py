"""`CompiledDecoder`: decodes with a step that AOTInductor compiled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kbitc.backends._decoding.cache import GrowingCache
from kbitc.backends._decoding.decode_step import TracedStep
from kbitc.backends.cpu.generating import StepDecoder
from kbitc.backends.cpu.step_key import kept_folder
from kbitc.backends.cpu.step_package import (
    FUSIONS,
    compile_package,
    is_whole,
    load_package,
    package_key,
)
from kbitc.pipeline import Pass
from kbitc.pipeline.defaults import lowering_pipeline
from kbitc.pipeline.records import Fired
from kbitc.system.json_file import read_json


class CompiledDecoder(StepDecoder):
    """Decodes with the compiled step; prompts are read by the model itself, into the same cache.

    Compiling happens here, unless a package for such a model is in the cache folder.

    Attributes:
        model: as given.
        passes: that lowered the step.
        why_compiled: why this is no native step; "" where nobody tried one.
        package: folder of the compiled step.
        was_compiled: False if the package was there already.
        fusions: what those passes did and left.

    Raises:
        UsageError: not a causal language model on the CPU whose layers have keys and values, or one
            that torch.export cannot trace.
        BackendUnavailable: no C++ compiler, or compiling failed.
    """

    name = "cpu"

    def __init__(self, model: nn.Module, passes: Sequence[Pass] | None = None, why: str = "") -> None:
        super().__init__(model)
        self.why_compiled = why
        self.passes = tuple(lowering_pipeline() if passes is None else passes)
        step = TracedStep(model)
        state = step.state()
        root = kept_folder()
        key = package_key(model, step, state, self.passes)
        self.package = root / key
        self.was_compiled = not is_whole(self.package)
        if self.was_compiled:
            compile_package(model, root, self.package, state, self.passes)
        fusions = read_json(self.package / FUSIONS)
        self.fusions = {name: Fired.from_json(record) for name, record in fusions.items()}
        self._run = load_package(self.package, state)
        self._state = state

    def _step(self, ids: Tensor, cache: GrowingCache) -> Tensor:
        logits: Tensor
        (logits,) = self._run([ids, *cache.numbers()])
        return logits
