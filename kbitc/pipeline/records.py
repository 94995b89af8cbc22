"""What fusion and clean-up passes did, and what they left and why: one record for all of them.

The one thing to know: every candidate of a pass is in its record, in a group that was rewritten or with
the reason why not. A pass keeps its record as the fact of its own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kbitc.graph.program import Program


@dataclass(frozen=True)
class Fired:
    """The record of one pass.

    Attributes:
        groups: names of what was rewritten together, one tuple for each time that the pass fired: nodes
            of the graph before the pass, or stored tensors where the pass changes those.
        left: name to reason, for every other candidate.
        digest: of the numbers by which stored tensors were changed, where the pass chose some; a run that is
            resumed must have the same.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        digest = {"digest": self.digest} if self.digest else {}
        return {"groups": [list(names) for names in self.groups], "left": dict(self.left), **digest}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Fired:
        """The inverse of :meth:`to_json`.

        >>> Fired.from_json(Fired((("q", "k"),), {"o": "alone"}).to_json())
        Fired(groups=(('q', 'k'),), left={'o': 'alone'}, digest='')
        """
        left = {str(name): str(reason) for name, reason in data["left"].items()}
        groups = tuple(tuple(map(str, names)) for names in data["groups"])
        return Fired(groups, left, str(data.get("digest", "")))


def records(program: Program) -> dict[str, Fired]:
    """What the passes of a program have recorded, by the passes' names, in the order that they ran."""
    return {fact.name: record for fact, record in program.facts.items() if isinstance(record, Fired)}


def lines(fired: Mapping[str, Fired]) -> Iterator[str]:
    """Records for people: how often each pass fired, then each reason with how often it was one.

    >>> list(lines({"merge_linears": Fired((("q", "k"),), {"o": "alone", "d": "alone"})}))
    ['merge_linears: fired 1 times (2 names), left 2', '  2 left: alone']
    """
    for name, record in fired.items():
        names = sum(map(len, record.groups))
        yield f"{name}: fired {len(record.groups)} times ({names} names), left {len(record.left)}"
        for reason, count in Counter(record.left.values()).most_common():
            yield f"  {count} left: {reason}"
