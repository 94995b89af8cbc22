"""How far a trace is: the model's modules, counted as they run.

The one thing to know: a trace runs forward once, and most of its time goes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from kbitc.graph.context import Progress


@contextmanager
def told_of_modules(model: nn.Module, on_progress: Progress) -> Iterator[None]:
    """Tells of every module without parts that runs for the first time within the block.

    Args:
        model: that is traced; it has hooks within the block alone.
        on_progress: told of modules.
    """
    parts = [module for module in model.modules() if not any(module.children())]
    seen: set[int] = set()

    def tell(module: nn.Module, _: object) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            on_progress("capturing the graph", len(seen), len(parts))

    hooks = [module.register_forward_pre_hook(tell) for module in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
