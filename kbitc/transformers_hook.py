"""What kbitc adds to libraries that it does not import: made known to them at the right moment.

The one thing to know: the ``kbit`` quantization method is registered when transformers is first imported (or
now, if it was before), so that ``AutoModelForCausalLM.from_pretrained(folder)`` works wherever kbitc is
installed, and the model ``kbitc`` when lm-evaluation-harness has named its own, so that ``lm_eval --model
kbitc`` does: ``import torch`` calls `register_when_imported`, an entry point of the group ``torch.backends``.
The harness has no group of entry points to look models up in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_when_imported() -> None:
    """Register with each library now if it is loaded, else when it is."""
    for target, register in _REGISTER.items():
        if target in sys.modules and not _is_half_loaded(target):
            register()
        elif not any(
            isinstance(finder, _AfterImport) and finder.target == target for finder in sys.meta_path
        ):
            sys.meta_path.insert(0, _AfterImport(target))


class _AfterImport(MetaPathFinder):
    """Finds one module as Python would, and registers once it has run.

    Where that one is what imports torch, and torch this, it is half loaded by now: then the next module of
    its package that is looked for tells that it is whole, and a model cannot be loaded before.
    """

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.target in sys.modules:
            package = self.target.partition(".")[0]
            if name.startswith(f"{package}.") and not _is_half_loaded(self.target):
                sys.meta_path.remove(self)
                _REGISTER[self.target]()
            return None
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _REGISTER[self.target])
        return spec


def _is_half_loaded(target: str) -> bool:
    return bool(getattr(sys.modules[target].__spec__, "_initializing", False))


class _Registering(Loader):
    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register()


def _register_quantizer() -> None:
    # It registers at its end; where it is what imports transformers, that is later: it is half imported here.
    import kbitc.compiler.transformers_client  # noqa: F401


def _register_harness_model() -> None:
    from lm_eval.api.registry import model_registry

    if "kbitc" not in model_registry:
        model_registry.register("kbitc", target="kbitc.evaluation.harness_model:KbitLM")


_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "lm_eval.models": _register_harness_model,
}
"""By the module that must have run."""
