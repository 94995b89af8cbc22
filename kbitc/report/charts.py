"""Charts as small inline SVG: a heat map of roles by layers, and curves of bits against loss.

The one thing to know: an SVG here carries its numbers as hover titles and its summary as a label for
screen readers. Colours are of one scale, viridis, which stays readable without colour vision and in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kbitc.planning.tradeoff import Point
from kbitc.report.page import render

# Viridis at five places: evenly bright from dark to light (Smith and van der Walt, 2015).
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_STEPS = 12  # of a scale as it is drawn
WIDTH = 1000
_LABELS = 190  # pixels left of the cells, for the roles' names
_ROW = 20
_CURVE_POINTS = 300
_MOST_BITS = 9  # everything beyond is left out


@dataclass(frozen=True)
class Scale:
    """The colours of numbers between two ends.

    Attributes:
        low: drawn darkest.
        high: drawn lightest.
        label: what the numbers are.
        is_logarithmic: equal ratios are equal steps; what is below a millionth counts as that.
    """

    low: float
    high: float
    label: str = ""
    is_logarithmic: bool = False

    def colour(self, value: float) -> tuple[int, int, int]:
        """Of one number.

        >>> Scale(1.0, 100.0, is_logarithmic=True).colour(10.0) == viridis(0.5)
        True
        """
        low, high, own = map(self._placed, (self.low, self.high, value))
        return viridis((own - low) / (high - low) if high > low else 0.5)

    def _placed(self, value: float) -> float:
        return math.log(max(value, 1e-6)) if self.is_logarithmic else value

    @property
    def steps(self) -> list[str]:
        """Colours from low to high, for a key."""
        return [written(viridis(i / (_STEPS - 1))) for i in range(_STEPS)]


def viridis(share: float) -> tuple[int, int, int]:
    """The colour at ``share`` of the scale, 0 to 1.

    >>> viridis(0.0), viridis(1.0)
    ((68, 1, 84), (253, 231, 37))
    """
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    a, b = _VIRIDIS[i], _VIRIDIS[i + 1]
    red, green, blue = (round(p + (q - p) * (place - i)) for p, q in zip(a, b, strict=True))
    return red, green, blue


def written(colour: tuple[int, int, int]) -> str:
    """A colour as SVG has it.

    >>> written(viridis(0.0))
    '#440154'
    """
    return f"#{bytes(colour).hex()}"


@dataclass(frozen=True)
class HeatCell:
    """One weight of a heat map.

    Attributes:
        value: what the colour says.
        text: what stands in the cell, if it is wide enough.
        title: what the pointer shows.
    """

    value: float
    text: str
    title: str


@dataclass(frozen=True)
class HeatRow:
    """One role: its cells by layer. A row without layers has one cell, as wide as all layers."""

    label: str
    cells: Mapping[int, HeatCell]
    has_layers: bool = True


def heat_map(rows: Sequence[HeatRow], label: str, caption: str) -> Markup:
    """A figure: rows of cells, layers to the right, with a scale below.

    Args:
        rows: at least one cell in all.
        label: what the colours say, for screen readers and the scale.
        caption: above it.
    """
    values = [cell.value for row in rows for cell in row.cells.values()]
    colours = Scale(min(values), max(values), label)
    layers = 1 + max((layer for row in rows if row.has_layers for layer in row.cells), default=0)
    width = (WIDTH - _LABELS) / layers
    bottom = len(rows) * _ROW
    numbered = range(0, layers, math.ceil(layers / 40)) if any(row.has_layers for row in rows) else ()
    return render(
        "heat_map",
        caption=caption,
        summary=f"{label}: {colours.low:.3g} to {colours.high:.3g}",
        rows=[
            {"label": _short(row.label), "y": i * _ROW, "cells": _heat_cells(row, colours, width, layers)}
            for i, row in enumerate(rows)
        ],
        layers=[(_LABELS + (layer + 0.5) * width, layer) for layer in numbered],
        colours=colours,
        left=_LABELS,
        row_height=_ROW,
        bottom=bottom,
        width=WIDTH,
        height=bottom + 42,
    )


def _heat_cells(row: HeatRow, colours: Scale, width: float, layers: int) -> list[dict[str, object]]:
    wide = width if row.has_layers else max(width, min(width * layers, 120))
    cells: list[dict[str, object]] = []
    for layer, cell in row.cells.items():
        red, green, blue = colours.colour(cell.value)
        is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 128
        cells.append(
            {
                "x": _LABELS + (layer * width if row.has_layers else 0),
                "width": max(wide, 1.5),
                "fill": written((red, green, blue)),
                "ink": "on-light" if is_light else "on-dark",
                "is_narrow": wide < 8 * len(cell.text),
                "text": "" if wide < 5.5 * len(cell.text) else cell.text,
                "title": cell.title,
            }
        )
    return cells


def trade_off(
    curve: Sequence[Point],
    uniform: Sequence[Point],
    chosen: Point | None,
    measured: Sequence[Point],
    unit: str,
) -> Markup:
    """A figure: stored bits to the right, cost upwards on a logarithmic scale; nothing beyond 9 bits."""
    curve, uniform, measured = (
        [p for p in points if p.bits <= _MOST_BITS and p.cost > 0] for points in (curve, uniform, measured)
    )
    own = [chosen] if chosen is not None and chosen.cost > 0 else []
    every = [*curve, *uniform, *measured, *own]
    if len(every) < 2:
        return Markup()
    axes = _Axes.around(every)
    thin = [*curve[:: max(1, len(curve) // _CURVE_POINTS)], *curve[-1:]]
    key = {"uniform": "one spec for every weight", "chosen": "this artifact, predicted"}
    return render(
        "curve",
        axes=axes,
        unit=unit,
        path=[(axes.x(p.bits), axes.y(p.cost)) for p in thin],
        marks=[
            {"kind": kind, "x": axes.x(p.bits), "y": axes.y(p.cost), "title": _said(p, unit)}
            for kind, points in (("uniform", uniform), ("measured", measured), ("chosen", own))
            for p in points
        ],
        key=list((key | ({"measured": "measured"} if measured else {})).items()),
    )


@dataclass(frozen=True)
class _Axes:
    """From bits and cost to pixels.

    Attributes:
        fewest: bits at the left end.
        most: bits at the right end.
        low: the lowest cost's power of ten.
        high: the highest cost's.
    """

    fewest: float
    most: float
    low: int
    high: int

    width = WIDTH
    height = 420
    left = 70
    right = WIDTH - 20
    top = 30
    floor = 375

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Axes:
        bits = [p.bits for p in points]
        costs = [math.log10(p.cost) for p in points]
        return cls(math.floor(min(bits)), math.ceil(max(bits)), math.floor(min(costs)), math.ceil(max(costs)))

    def x(self, bits: float) -> float:
        share = (bits - self.fewest) / max(1e-9, self.most - self.fewest)
        return self.left + share * (self.right - self.left)

    def y(self, cost: float) -> float:
        share = (math.log10(cost) - self.low) / max(1, self.high - self.low)
        return self.floor - share * (self.floor - self.top)

    @property
    def costs(self) -> list[tuple[float, str]]:
        """Where the powers of ten are, and what is written there."""
        return [(self.y(10.0**power), f"{10.0**power:g}") for power in range(self.low, self.high + 1)]

    @property
    def bits(self) -> list[tuple[float, str]]:
        """Where the half bits are, and what is written there."""
        halves = range(round(2 * self.fewest), round(2 * self.most) + 1)
        return [(self.x(half / 2), f"{half / 2:g}") for half in halves]


def _said(point: Point, unit: str) -> str:
    return f"{point.label}: {point.bits:.3f} bits, {point.cost:.4g} {unit}"


def _short(label: str) -> str:
    return label if len(label) <= 30 else "…" + label[-29:]
