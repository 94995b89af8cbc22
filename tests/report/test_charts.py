"""Charts: one colour scale for all of them, and axes that hold every point."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from kbitc.planning.tradeoff import Point
from kbitc.report.charts import HeatCell, HeatRow, Scale, heat_map, trade_off, viridis, written
from kbitc.report.outlier_map import MOST_PANELS, outlier_map

REPORT = Path(str(resources.files("kbitc.report")))
BLACK, WHITE = "#000", "#fff"


def fills(html):
    return set(re.findall(r'fill="(#\w+)"', html))


def test_the_scale_gets_lighter():
    brightness = [
        0.299 * red + 0.587 * green + 0.114 * blue
        for red, green, blue in (viridis(i / 50) for i in range(51))
    ]
    assert brightness == sorted(brightness)
    assert viridis(-1.0) == viridis(0.0)
    assert viridis(2.0) == viridis(1.0)
    assert Scale(3.0, 3.0).colour(3.0) == viridis(0.5)


def test_every_map_has_the_one_scale():
    key = set(Scale(0.0, 1.0).steps)
    cells = {layer: HeatCell(float(layer), f"{layer}", "title") for layer in range(2)}
    ends = {written(viridis(0.0)), written(viridis(1.0))}
    heat = heat_map([HeatRow("role", cells)], "label", "caption")
    features = {f"h.{i}.w": {"index": [1], "magnitude": [10.0**i]} for i in range(3)}
    outliers = outlier_map(features)
    assert fills(heat) == key
    assert fills(outliers) == key | {written(viridis(0.5))}
    assert ends <= key


def test_no_other_colours_are_written_down():
    """Charts take theirs from the scale; everything else is in the style sheet."""
    for path in [*REPORT.glob("*.py"), *(REPORT / "templates").iterdir()]:
        assert re.findall(r"""["'](#[0-9a-fA-F]{3,6})["']""", path.read_text(encoding="utf-8")) in (
            [],
            ["#440154"],
        )


def test_equal_colours_are_equal_numbers_in_all_panels():
    """Panels share the scale, so that two of them can be compared."""
    features = {
        "h.0.a": {"index": [1, 2], "magnitude": [1.0, 10.0]},
        "h.0.b": {"index": [1, 2], "magnitude": [10.0, 100.0]},
    }
    colours = re.findall(
        r'fill="(#\w+)"><title>layer 0, feature \d: largest \|x\| (\d+)<', outlier_map(features)
    )
    assert {number: colour for colour, number in colours} == {
        "1": written(viridis(0.0)),
        "10": written(viridis(0.5)),
        "100": written(viridis(1.0)),
    }


def test_experts_of_a_layer_have_panels_of_their_own():
    features = {f"h.0.experts.{i}.w": {"index": [i], "magnitude": [2.0]} for i in range(3)}
    html = outlier_map(features)
    assert re.findall(r"<code>(.*?)</code>", html) == [f"h.*.experts.{i}.w" for i in range(3)]
    assert html.count("1 features in 1 of 1 layers</figcaption>") == 3


def test_a_weight_outside_the_layers_shares_no_panel_with_one_of_a_layer():
    features = dict.fromkeys(
        ("embed.weight", "h.0.q.weight", "h.0.k.weight"), {"index": [7], "deviation": [4.5]}
    )
    html = outlier_map(features)
    assert "<code>embed.weight</code>: 1 features</figcaption>" in html
    assert "<code>h.*.q.weight</code>, <code>h.*.k.weight</code>: 1 features in 1 of 1 layers" in html
    assert "<title>feature 7: standard deviations above the mean 4.5</title>" in html


def test_a_map_ends():
    features = {f"h.0.experts.{i}.w": {"index": [i], "magnitude": [2.0]} for i in range(MOST_PANELS + 3)}
    html = outlier_map(features)
    assert html.count("<figcaption>") == MOST_PANELS
    assert "3 more roles are not drawn." in html


@pytest.mark.parametrize("chosen", [None, Point(4.0, 0.02, "own"), Point(4.0, 0.0, "free")])
def test_marks_are_within_the_axes(chosen):
    curve = [Point(2.0 + i / 100, 2.0**-i) for i in range(0, 900, 3)]
    uniform = [Point(4.1, 0.3, "int4:64"), Point(16.0, 0.1, "fp16")]
    html = trade_off(curve, uniform, chosen, [Point(4.5, 0.1, "m on t")], "nats")
    assert "fp16" not in html  # beyond nine bits
    assert html.count("<title>") == 2 + (chosen is not None and chosen.cost > 0)
    (points,) = re.findall(r'points="(.*?)"', html)
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 70 <= x <= 980
        assert 30 <= y <= 375
