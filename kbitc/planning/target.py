"""What a plan is made for, where another program than kbitc is to hold the weights.

The one thing to know: without a target bytes are those of kbitc's own artifact. With one, the options of
every weight are what the target holds as it is, and their bytes are those of the target's file, so that a
budget is kept there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from kbitc.formats.spec import Spec
from kbitc.graph.plan import Choice
from kbitc.graph.program import Program, Rest, Weight


class Target(Protocol):
    """Containers of another program.

    Attributes:
        name: as ``kbitc compile --for`` has it.
        agree: kind of weights that must have one spec there (`kbitc.graph.queries.KINDS`); "" for none.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def agree(self) -> str:
        """See the class."""
        ...

    def candidates(self, weight: Weight) -> Sequence[Spec]:
        """What it holds of a weight as it is, beside 16 bits."""
        ...

    def misfit(self, weight: Weight, spec: Spec) -> str:
        """Why it does not hold a spec as it is: what it holds instead; "" if it does."""
        ...

    def weight_bytes(self, weight: Weight, spec: Spec) -> int:
        """Bytes of a weight in its file, with all that is needed to read it; of one left alone, too."""
        ...

    def rest_bytes(self, rest: Rest) -> int:
        """Bytes of another tensor in its file."""
        ...


def target_bytes(target: Target, program: Program) -> int:
    """Bytes of all tensors of a planned program in a target's file: what a budget counts."""
    assert program.plan is not None
    choices = program.plan.weights
    packed = sum(target.weight_bytes(weight, choices[name].spec) for name, weight in program.weights.items())
    return packed + sum(map(target.rest_bytes, program.rest.values()))


def misfits(
    target: Target, weights: Mapping[str, Weight], choices: Mapping[str, Choice]
) -> Iterator[tuple[str, Spec, str, float]]:
    """The weights of a plan that a target does not hold as they are.

    Yields:
        The weight's name, its spec, what the target holds instead, and the bits per parameter there.
    """
    for name, weight in weights.items():
        spec = choices[name].spec
        instead = target.misfit(weight, spec)
        if instead:
            yield name, spec, instead, 8 * target.weight_bytes(weight, spec) / weight.numel
