"""torch.export as all of kbitc calls it: it runs a module once, whose operations become a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """The graph of a module.

    Args:
        model: in eval mode; on fake or real tensors.
        args: positional inputs.
        kwargs: named inputs.
        dynamic_shapes: as torch.export takes them.
    """
    named = None if kwargs is None else dict(kwargs)
    # Without no_grad each @torch.no_grad function of the model becomes an opaque sub-graph.
    with torch.no_grad(), without_stacks():
        return torch.export.export(model, args, named, dynamic_shapes=dynamic_shapes, strict=False)


@contextmanager
def without_stacks() -> Iterator[None]:
    """No node that is traced gets the lines of Python that it comes from: a fifth of the time."""
    config: Any = fx.config
    before = getattr(config, "do_not_emit_stack_traces", False)  # which older versions of torch do not ask
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before
