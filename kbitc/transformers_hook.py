"""The ``kbit`` quantization method, made known to transformers at the right moment.

The one thing to know: it is registered when transformers is first imported (or now, if it was before),
so that ``AutoModelForCausalLM.from_pretrained(folder)`` works wherever kbitc is installed: ``import torch``
calls `register_when_imported`, an entry point of the group ``torch.backends``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register now if transformers' quantizers are loaded, else when they are."""
    if _TARGET in sys.modules and not _is_half_loaded():
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as Python would, and registers once it has run.

    Where that one is what imports torch, and torch this, it is half loaded by now: then the next module of
    transformers that is looked for tells that it is whole, and a model cannot be loaded before.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _TARGET in sys.modules:
            if name.startswith("transformers.") and not _is_half_loaded():
                sys.meta_path.remove(self)
                _register()
            return None
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def _is_half_loaded() -> bool:
    return bool(getattr(sys.modules[_TARGET].__spec__, "_initializing", False))


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    # It registers at its end; where it is what imports transformers, that is later: it is half imported here.
    import kbitc.compiler.transformers_client  # noqa: F401
