"""Which model torch.compile is compiling: Dynamo hands its backends a graph, and never says of what.

The one thing to know: after a graph break the frame that is compiled may be that of a layer. The model is
then the outermost module whose forward is under way inside of the compiled call, and that is on the stack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

WRAPPER = "compile_wrapper"  # torch._dynamo.eval_frame: what torch.compile returns runs in it


def owner(parameters: Sequence[Tensor]) -> nn.Module | None:
    """The outermost module of the compiled call that holds all of ``parameters``; None if there is none."""
    wanted = {id(parameter) for parameter in parameters}
    for module in _candidates():
        if wanted <= {id(parameter) for parameter in module.parameters()}:
            return module
    return None


def _candidates() -> Iterator[nn.Module]:
    """Modules of the compiled call, outermost first; then those that the compiled function names."""
    inside: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == WRAPPER and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            inside.append(getattr(frame.f_locals.get("fn"), "__self__", None))  # type: ignore[arg-type]
            break
        inside.append(frame.f_locals.get("self"))  # type: ignore[arg-type]
        frame = frame.f_back
    for value in (*reversed(inside), *_named()):
        value = getattr(value, "_orig_mod", value)  # noqa: PLW2901  # what torch.compile wraps
        if isinstance(value, nn.Module):
            yield value


def _named() -> Iterator[Any]:
    """Values of the names in the function that Dynamo is tracing: it is not on the stack yet."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer: Any = InstructionTranslator.current_tx()
    yield from tracer.f_locals.values()
    yield from (tracer.f_globals[name] for name in tracer.f_code.co_names if name in tracer.f_globals)
