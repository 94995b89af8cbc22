"""A heat map of outlier features: layers down, features across, colour by how far each stands out.

The one thing to know: it takes what a plan file or ``kbitc inspect --json`` says of each weight, and gives a
piece of HTML without scripts or links. Weights of one place in all layers share a panel; so do places whose
maps are equal, as those of queries, keys and values are.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

CELL = 16  # pixels
LABEL = 64
FIGURES = {"magnitude": "largest |x|", "deviation": "standard deviations above the mean"}
LOW, HIGH = (0xFD, 0xE0, 0xC5), (0x8B, 0x1A, 0x2B)  # light to dark, readable on white and on black

Cells = dict[int, float]  # by feature
Panel = dict[str, Cells]  # by layer


def outlier_map(features: Mapping[str, Mapping[str, Any]]) -> str:
    """The panels as HTML with inline SVG, or a sentence where no weight has outlier features.

    Args:
        features: by weight name: ``index`` and, in the same order, ``magnitude`` or ``deviation``
            (`kbitc.outliers.Found.to_json`).
    """
    figure = next((key for key in FIGURES for entry in features.values() if entry.get(key)), None)
    if figure is None:
        return "<p class=why>No weight has outlier features.</p>"
    panels: dict[str, Panel] = {}
    for name, entry in features.items():
        role, layer = _place(name)
        cells = dict(zip(entry["index"], entry.get(figure, ()), strict=False))
        panels.setdefault(role, {})[layer] = cells
    merged: list[tuple[list[str], Panel]] = []
    for role, panel in panels.items():
        if not any(panel.values()):
            continue
        same = next((roles for roles, known in merged if known == panel), None)
        if same is None:
            merged.append(([role], panel))
        else:
            same.append(role)
    parts = [f"<p class=why>Colour: {html.escape(FIGURES[figure])}, on a logarithmic scale.</p>"]
    parts += [_panel(", ".join(roles), panel, figure) for roles, panel in merged]
    return "\n".join(parts)


def _place(name: str) -> tuple[str, str]:
    """A weight's role in its layer, and the layer's number; "" for a weight outside the layers."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    role = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    return role, number[0] if number else ""


def _panel(title: str, panel: Panel, figure: str) -> str:
    columns = sorted({feature for cells in panel.values() for feature in cells})
    values = [value for cells in panel.values() for value in cells.values()]
    low, high = math.log(max(min(values), 1e-6)), math.log(max(*values, 1e-6))
    width, height = LABEL + CELL * len(columns) + 2, LABEL + CELL * len(panel) + 2
    shapes = [
        f"<text x={LABEL + CELL * i + 12} y={LABEL - 4} "
        f"transform='rotate(-60 {LABEL + CELL * i + 12} {LABEL - 4})'>{feature}</text>"
        for i, feature in enumerate(columns)
    ]
    for row, (layer, cells) in enumerate(panel.items()):
        y = LABEL + CELL * row
        shapes.append(f"<text x={LABEL - 6} y={y + 12} text-anchor=end>{html.escape(layer or 'all')}</text>")
        for i, feature in enumerate(columns):
            if feature not in cells:
                continue
            value = cells[feature]
            share = (math.log(max(value, 1e-6)) - low) / (high - low) if high > low else 1.0
            shapes.append(
                f"<rect x={LABEL + CELL * i} y={y} width={CELL - 1} height={CELL - 1} "
                f"fill='{_colour(share)}'>"
                f"<title>layer {html.escape(layer)}, feature {feature}: {FIGURES[figure]} {value:.4g}</title>"
                "</rect>"
            )
    return (
        f"<figure style='margin:1rem 0;overflow-x:auto'><figcaption><code>{html.escape(title)}</code>: "
        f"{len(columns)} features in {sum(map(bool, panel.values()))} of {len(panel)} layers</figcaption>"
        f"<svg width={width} height={height} font-size=10 fill=currentColor role=img>{''.join(shapes)}</svg>"
        "</figure>"
    )


def _colour(share: float) -> str:
    mixed: Iterable[int] = (round(a + share * (b - a)) for a, b in zip(LOW, HIGH, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def summary(entry: Mapping[str, Any], most: int = 6) -> str:
    """One line for a table: how many features, which, how far they stand out; "-" for none."""
    index = entry["index"]
    if not index:
        return "-"
    listed = ", ".join(map(str, index[:most])) + (" ..." if len(index) > most else "")
    kept = f", {entry['kept']} kept" if "kept" in entry else ""
    if entry.get("magnitude"):
        return f"{len(index)}: {listed} (|x| up to {max(entry['magnitude']):.3g}{kept})"
    return f"{len(index)}: {listed} ({max(entry['deviation']):.2g} sigma{kept})"
