"""Charts as small inline SVG: a heat map of roles by layers, and curves of bits against loss.

The one thing to know: an SVG here carries its numbers as hover titles and its summary as a label for
screen readers. Cells are coloured by viridis, which stays readable without colour vision and in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kbitc.planning.tradeoff import Point
from kbitc.report.page import join

# Viridis at five places: evenly bright from dark to light (Smith and van der Walt, 2015).
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
WIDTH = 1000
_LABELS = 190  # pixels left of the cells, for the roles' names
_ROW = 20
_CURVE_POINTS = 300

_SVG = Markup("<svg viewBox='0 0 {} {}' role=img aria-label='{}'>{}</svg>")
_TEXT = Markup("<text x='{:.1f}' y='{:.1f}' text-anchor={}>{}</text>")
_LINE = Markup("<line class=axis x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}'/>")


@dataclass(frozen=True)
class HeatCell:
    """One weight of a heat map.

    Attributes:
        value: what the colour shows.
        shown: what stands in the cell, if it is wide enough.
        title: what the pointer shows.
    """

    value: float
    shown: str
    title: str


@dataclass(frozen=True)
class HeatRow:
    """One role: its cells by layer. A row without layers has one cell, as wide as all layers."""

    label: str
    cells: Mapping[int, HeatCell]
    has_layers: bool = True


def heat_map(rows: Sequence[HeatRow], label: str) -> Markup:
    """Rows of cells, layers to the right, with a scale below.

    Args:
        rows: at least one cell in all.
        label: what the colours show, for screen readers and the scale.
    """
    values = [cell.value for row in rows for cell in row.cells.values()]
    low, high = min(values), max(values)
    layers = 1 + max((layer for row in rows if row.has_layers for layer in row.cells), default=0)
    width = (WIDTH - _LABELS) / layers
    parts = []
    for y, row in enumerate(rows):
        top = y * _ROW
        parts.append(_TEXT.format(_LABELS - 6, top + 14, "end", _short(row.label)))
        for layer, cell in row.cells.items():
            x, wide = (
                (_LABELS + layer * width, width) if row.has_layers else (_LABELS, min(width * layers, 120))
            )
            share = (cell.value - low) / (high - low) if high > low else 0.5
            parts.append(_heat_cell(cell, share, x, top, wide))
    bottom = len(rows) * _ROW
    if any(row.has_layers for row in rows):
        step = max(1, math.ceil(layers / 40))
        parts += [
            _TEXT.format(_LABELS + (layer + 0.5) * width, bottom + 13, "middle", layer)
            for layer in range(0, layers, step)
        ]
        parts.append(_TEXT.format(_LABELS - 6, bottom + 13, "end", "layer"))
    parts.append(_scale(low, high, label, bottom + 24))
    return _SVG.format(WIDTH, bottom + 42, f"{label}: {low:.3g} to {high:.3g}", join(parts))


def trade_off(
    curve: Sequence[Point],
    uniform: Sequence[Point],
    chosen: Point | None,
    measured: Sequence[Point],
    unit: str,
) -> Markup:
    """Stored bits to the right, cost upwards on a logarithmic scale; everything beyond 9 bits is left out."""
    curve, uniform, measured = (
        [p for p in points if p.bits <= 9 and p.cost > 0] for points in (curve, uniform, measured)
    )
    every = [*curve, *uniform, *measured, *([chosen] if chosen and chosen.cost > 0 else [])]
    if len(every) < 2:
        return Markup()
    axes = _Axes.around(every)
    thin = curve[:: max(1, len(curve) // _CURVE_POINTS)] + curve[-1:]
    path = " ".join(f"{axes.x(p.bits):.1f},{axes.y(p.cost):.1f}" for p in thin)
    parts = [axes.drawn(unit), Markup("<polyline class=curve points='{}'/>").format(path)]
    ring = Markup("<circle class=uniform cx='{:.1f}' cy='{:.1f}' r=4><title>{}</title></circle>")
    parts += [ring.format(axes.x(p.bits), axes.y(p.cost), _said(p, unit)) for p in uniform]
    triangle = Markup("<path class=measured d='M{:.1f} {:.1f}l6 11h-12z'><title>{}</title></path>")
    parts += [triangle.format(axes.x(p.bits), axes.y(p.cost) - 6, _said(p, unit)) for p in measured]
    if chosen is not None and chosen.cost > 0:
        diamond = Markup("<path class=chosen d='M{:.1f} {:.1f}l8 8l-8 8l-8 -8z'><title>{}</title></path>")
        x, y = axes.x(chosen.bits), axes.y(chosen.cost)
        parts.append(diamond.format(x, y - 8, _said(chosen, unit)))
    parts.append(_key(has_measured=bool(measured)))
    label = f"predicted loss increase ({unit}) against stored bits per parameter"
    return _SVG.format(WIDTH, _Axes.HEIGHT, label, join(parts))


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


def _heat_cell(cell: HeatCell, share: float, x: float, top: float, width: float) -> Markup:
    colour = viridis(share)
    drawn = Markup(
        "<rect x='{:.1f}' y='{}' width='{:.1f}' height='{}' fill='#{}'><title>{}</title></rect>"
    ).format(x, top, max(width - 1, 0.5), _ROW - 1, bytes(colour).hex(), cell.title)
    is_narrow = width < 8 * len(cell.shown)
    if width < 5.5 * len(cell.shown):
        return drawn
    red, green, blue = colour
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#fff"
    text = "<text{} x='{:.1f}' y='{}' text-anchor=middle style='fill:{}' pointer-events=none>{}</text>"
    size = Markup(" class=narrow") if is_narrow else ""
    return drawn + Markup(text).format(size, x + width / 2, top + 14, ink, cell.shown)  # noqa: S704


def _scale(low: float, high: float, label: str, top: float) -> Markup:
    rect = Markup("<rect x='{:.1f}' y='{}' width=13 height=10 fill='#{}'/>")
    steps = join(rect.format(_LABELS + 60 + 12 * i, top, bytes(viridis(i / 11)).hex()) for i in range(12))
    return (
        _TEXT.format(_LABELS + 54, top + 9, "end", f"{low:.3g}")
        + steps
        + _TEXT.format(_LABELS + 212, top + 9, "start", f"{high:.3g} {label}")
    )


@dataclass(frozen=True)
class _Axes:
    """From bits and cost to pixels."""

    left_bits: float
    right_bits: float
    low: int  # powers of ten
    high: int

    HEIGHT = 420
    LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 45

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Axes:
        bits = [p.bits for p in points]
        costs = [math.log10(p.cost) for p in points]
        return cls(math.floor(min(bits)), math.ceil(max(bits)), math.floor(min(costs)), math.ceil(max(costs)))

    def x(self, bits: float) -> float:
        share = (bits - self.left_bits) / max(1e-9, self.right_bits - self.left_bits)
        return self.LEFT + share * (WIDTH - self.LEFT - self.RIGHT)

    def y(self, cost: float) -> float:
        share = (math.log10(cost) - self.low) / max(1, self.high - self.low)
        return self.HEIGHT - self.BOTTOM - share * (self.HEIGHT - self.TOP - self.BOTTOM)

    def drawn(self, unit: str) -> Markup:
        right, floor = WIDTH - self.RIGHT, self.HEIGHT - self.BOTTOM
        parts = [
            _TEXT.format(self.LEFT, 14, "start", f"predicted loss increase, {unit} (logarithmic)"),
            _TEXT.format(right, self.HEIGHT - 8, "end", "stored bits per parameter of the whole model"),
        ]
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            parts += [
                _LINE.format(self.LEFT, y, right, y),
                _TEXT.format(self.LEFT - 6, y + 4, "end", f"{10.0**power:g}"),
            ]
        for half in range(round(2 * self.left_bits), round(2 * self.right_bits) + 1):
            x = self.x(half / 2)
            parts += [
                _LINE.format(x, floor, x, floor + 5),
                _TEXT.format(x, floor + 18, "middle", f"{half / 2:g}"),
            ]
        return join(parts)


def _key(*, has_measured: bool) -> Markup:
    x = WIDTH - 250
    parts = [
        Markup("<line class=curve x1='{}' y1=50 x2='{}' y2=50 />").format(x - 12, x + 12),
        _TEXT.format(x + 20, 54, "start", "best plans (hull of the score table)"),
        Markup("<circle class=uniform cx='{}' cy=70 r=4 />").format(x),
        _TEXT.format(x + 20, 74, "start", "one spec for every weight"),
        Markup("<path class=chosen d='M{} 82l8 8l-8 8l-8 -8z'/>").format(x),
        _TEXT.format(x + 20, 94, "start", "this artifact, predicted"),
    ]
    if has_measured:
        parts += [
            Markup("<path class=measured d='M{} 104l6 11h-12z'/>").format(x),
            _TEXT.format(x + 20, 114, "start", "measured"),
        ]
    return join(parts)


def _said(point: Point, unit: str) -> str:
    return f"{point.label}: {point.bits:.3f} bits, {point.cost:.4g} {unit}"


def _short(label: str) -> str:
    return label if len(label) <= 30 else "…" + label[-29:]
