"""Parts that several pages have: maps by layer, what passes did, what is not packed.

The one thing to know: a part is a `Section`, or the body of one, and an empty body leaves the section out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kbitc.artifact.plan_file import LeftAlone, PassEntry
from kbitc.graph.roles import by_role
from kbitc.pipeline.records import Fired
from kbitc.report.charts import HeatCell, HeatRow, heat_map
from kbitc.report.page import Cell, Section, code, count, render, table

MOST_ROLES = 60
"""Of a heat map; models with more name their layers in a way that we cannot read."""


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people.

    >>> shape_text((5, 7))
    '5×7'
    """
    return "×".join(map(str, shape))


def layer_map(cells: Mapping[str, HeatCell], label: str) -> Markup:
    """A figure of one number a weight: roles downwards, layers to the right.

    Args:
        cells: by weight name; none give no figure.
        label: what the numbers are.
    """
    if not cells:
        return Markup()
    roles = by_role(cells)
    stacks = {role.stack for role in roles if role.has_layers}
    rows = [
        HeatRow(
            f"{role.stack}: {role.name}" if role.has_layers and len(stacks) > 1 else role.name,
            {layer: cells[name] for layer, name in names.items()},
            role.has_layers,
        )
        for role, names in list(roles.items())[:MOST_ROLES]
    ]
    more = f"; {len(roles) - MOST_ROLES} more roles are in the table" if len(roles) > MOST_ROLES else ""
    return heat_map(rows, label, label.capitalize() + more)


def passes_section(passes: Sequence[PassEntry], seconds: Sequence[float] = ()) -> Section:
    """What each pass did to the graph.

    Args:
        passes: in the order that they ran.
        seconds: that each took, where that is known.
    """
    times = [[Cell(f"{1000 * s:,.1f} ms", s)] for s in seconds] or [[] for _ in passes]
    rows: list[list[Cell | str]] = [
        [code(entry.name), *time, count(entry.nodes_before), count(entry.nodes_after), entry.changes]
        for entry, time in zip(passes, times, strict=True)
    ]
    columns = ("pass", *(["time"] if seconds else []), "graph nodes before", "after", "what changed")
    return Section("Passes", table(columns, rows) if rows else Markup())


def fusions_section(fusions: Mapping[str, Fired]) -> Section:
    """What fusion and clean-up passes did, and why they left what they left."""
    rows: list[list[Cell | str]] = [
        [
            Cell(code=name, wraps=True),
            count(len(record.groups)),
            count(sum(map(len, record.groups))),
            count(len(record.left)),
            "; ".join(f"{times}: {reason}" for reason, times in Counter(record.left.values()).most_common()),
        ]
        for name, record in fusions.items()
    ]
    columns = ("pass", "fired", "names rewritten", "left", "how many, and why")
    return Section("Fusions", table(columns, rows) if rows else Markup())


def left_alone(entries: Mapping[str, LeftAlone]) -> Markup:
    """Tensors that are not packed, by reason; each reason folds its tensors."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, entry in entries.items():
        by_reason[entry.reason].append(f"{name} {shape_text(entry.shape)}")
    return render("left_alone", by_reason=by_reason)
