"""The oracle: run a canonical graph as it stands, packed weights in place of dense ones.

before:  linear(x, weight)
after:   the same call; a packed weight sends itself to torch.ops.kbit.linear
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kbitc.errors import UsageError
from kbitc.graph.program import Program, Stage

if TYPE_CHECKING:
    from kbitc.backends._decoding.decoder import Decoder


@dataclass(frozen=True)
class Eager:
    """Interprets the program's graph with reference kernels."""

    def missing(self) -> str | None:
        """Nothing is ever missing."""
        return None

    def decoder(self, model: nn.Module) -> Decoder:
        """Decodes with the model's own forward; needs transformers."""
        from kbitc.backends._decoding.decoder import Decoder

        return Decoder(model)

    def lower(self, program: Program, state: Mapping[str, Tensor]) -> Callable[..., Any]:
        """A function of the graph's inputs, in order, that returns its flat outputs.

        Args:
            program: canonical.
            state: parameters and buffers by name, packed or dense.

        Raises:
            UsageError: the program is not canonical yet, or the state lacks a tensor.
        """
        if program.stage < Stage.CANONICAL:
            raise UsageError("the eager backend runs canonical programs; run the pass 'canonicalize' first")
        lacking = sorted(set(program.parameters.values()) - set(state))
        if lacking:
            raise UsageError(f"the eager backend needs every tensor of the graph; '{lacking[0]}' is missing")
        graph = program.graph
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]

        def call(*inputs: Any) -> Any:
            given = iter(inputs)
            lifted = program.parameters
            return graph(*(state[lifted[n]] if n in lifted else next(given) for n in names))

        return call


BACKEND = Eager
