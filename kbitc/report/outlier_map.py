"""A heat map of outlier features: layers down, features across, colour by how far each stands out.

The one thing to know: it takes what a plan file or ``kbitc inspect --json`` says of each weight. Weights of
one role share a panel; so do roles whose maps are equal, as those of queries, keys and values are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from kbitc.graph.roles import Role, by_role
from kbitc.report.charts import Scale, written
from kbitc.report.page import render

CELL = 16  # pixels
LABEL = 64  # left of the cells
TOP = 40  # above them: five digits, leaning
MOST_PANELS = 60
"""Of one map; a mixture of experts has a role for each expert."""

FIGURES = {"magnitude": "largest |x|", "deviation": "standard deviations above the mean"}

Cells = dict[int, float]  # by feature
Panel = dict[int, Cells]  # by layer


def outlier_map(features: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The panels as figures, or a sentence where no weight has outlier features.

    Args:
        features: by weight name: ``index`` and, in the same order, ``magnitude`` or ``deviation``
            (`kbitc.sensitivity.outliers.OutlierFeatures.to_json`).
    """
    key = next((key for key in FIGURES for entry in features.values() if entry.get(key)), "")
    panels = _panels(features, key)
    values = [value for _, panel in panels for cells in panel.values() for value in cells.values()] or [1.0]
    colours = Scale(min(values), max(values), FIGURES.get(key, ""), is_logarithmic=True)
    return render(
        "outlier_map",
        panels=[_drawn(roles, panel, colours) for roles, panel in panels[:MOST_PANELS]],
        more=sum(len(roles) for roles, _ in panels[MOST_PANELS:]),
        colours=colours,
        cell=CELL,
        left=LABEL,
        top=TOP,
    )


def _panels(features: Mapping[str, Mapping[str, Any]], key: str) -> list[tuple[list[Role], Panel]]:
    """Roles whose maps are equal, and the map; roles without an outlier feature are left out."""
    merged: list[tuple[list[Role], Panel]] = []
    for role, names in by_role(features).items():
        panel = {
            layer: dict(zip(features[name]["index"], features[name].get(key, ()), strict=False))
            for layer, name in names.items()
        }
        if not any(panel.values()):
            continue
        same = next(
            (own for own, known in merged if known == panel and own[0].has_layers == role.has_layers), None
        )
        if same is None:
            merged.append(([role], panel))
        else:
            same.append(role)
    return merged


def _drawn(roles: list[Role], panel: Panel, colours: Scale) -> dict[str, object]:
    columns = {feature: i for i, feature in enumerate(sorted({f for cells in panel.values() for f in cells}))}
    has_layers = roles[0].has_layers
    where = f" in {sum(map(bool, panel.values()))} of {len(panel)} layers" if has_layers else ""

    def place(layer: int) -> str:
        return f"layer {layer}, " if has_layers else ""

    rows = [
        {
            "label": layer if has_layers else "all",
            "squares": [
                {
                    "column": columns[feature],
                    "fill": written(colours.colour(value)),
                    "title": f"{place(layer)}feature {feature}: {colours.label} {value:.4g}",
                }
                for feature, value in cells.items()
            ],
        }
        for layer, cells in panel.items()
    ]
    return {
        "roles": [role.pattern for role in roles],
        "summary": f"{len(columns)} features{where}",
        "features": list(columns),
        "rows": rows,
    }


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
