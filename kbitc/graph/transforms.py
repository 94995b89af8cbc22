"""Transforms of ``torch.func`` in graphs: the calls that open and close their regions, and which are taken.

The one thing to know: `torch.vmap` is taken, and no other. A gradient is taken of what is traced without
gradients, where it comes out as zeros, and may be asked for after its region has been closed; what `jvp`
opens are levels that no pass knows of.
"""

from __future__ import annotations

from torch import fx

OPENS_VMAP, CLOSES_VMAP = "_vmap_increment_nesting", "_vmap_decrement_nesting"

_OTHERS = {
    "_grad_increment_nesting": "torch.func.grad or vjp",
    "_jvp_increment_nesting": "torch.func.jvp",
}


def other_transform(graph: fx.GraphModule) -> str | None:
    """How users call a transform in a graph, or in one inside it, that is not `torch.vmap`; None without."""
    graphs = (module.graph for module in graph.modules() if isinstance(module, fx.GraphModule))
    names = (getattr(node.target, "__name__", "") for inner in graphs for node in inner.nodes)
    return next((_OTHERS[name] for name in names if name in _OTHERS), None)
