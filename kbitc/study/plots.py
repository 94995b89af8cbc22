"""The plots of a study's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kbitc.report.charts import viridis, written
from kbitc.report.figures import new_figure
from kbitc.study.curves import COUNTS, MEASURES, Curve, Family, Interval, Series, best_precision
from kbitc.study.fits import Fitted, NoFit

BITS = tuple(range(2, 9))


def colour_of(bits: int) -> str:
    """Of a precision; grey for 16 bits."""
    return "#888888" if bits not in BITS else written(viridis((bits - 2) / 7))


def precision_plot(
    family: Family, series: Series, fits: Mapping[int, Fitted | NoFit], *, is_fitted: bool
) -> Any:
    """Loss or accuracy against bits, a line a precision, with the frontier; 95 % intervals over items.

    Args:
        family: the rows.
        series: whose precisions are drawn.
        fits: power laws by precision.
        is_fitted: draw these in place of straight lines.
    """
    figure, axes = new_figure()
    curves = family.curves(series)
    baseline = Series("fp16", 0, "absmax", series.scope)
    whole = family.curve(baseline, 16)
    for bits, curve in [*curves.items(), *([(16, whole)] if whole is not None else [])]:
        shown = Curve(curve.bits, family.shown(curve.samples))
        _curve(axes, bits, shown, fits.get(bits) if is_fitted else None)
    best = best_precision(curves)
    if best is not None and not is_fitted:
        low = family.shown(np.nanmin([curve.at(best.places)[0] for curve in curves.values()], 0))
        axes.plot(best.places, low, color="#d55e00", linestyle=":", linewidth=2.5, zorder=9, label="frontier")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(COUNTS[family.count])
    axes.set_ylabel(MEASURES[family.measure])
    axes.legend(title="bits of a code", ncols=2, frameon=False)
    return figure


def _curve(axes: Any, bits: int, curve: Curve, fitted: Fitted | NoFit | None) -> None:
    low, high = np.quantile(curve.samples[1:], (0.025, 0.975), axis=0)
    middle = curve.samples[0]
    around = np.clip(np.stack([middle - low, high - middle]), 0.0, None)
    is_line = not isinstance(fitted, Fitted)
    axes.errorbar(
        curve.bits, middle, around, color=colour_of(bits), marker="o", markersize=4, elinewidth=0.8,
        linestyle="-" if is_line else "none", label=str(bits),
    )  # fmt: skip
    if isinstance(fitted, Fitted):
        places = np.geomspace(curve.bits[0], curve.bits[-1], 100)
        axes.plot(places, fitted.predict(places, np.full(100, float(bits))), color=colour_of(bits))


def loss_plot(lines: Mapping[str, Mapping[int, Interval]], label: str) -> Any:
    """Extra loss against bits of a code, a line a kind.

    Args:
        lines: by kind and precision.
        label: of the vertical axis.
    """
    figure, axes = new_figure()
    for i, (name, points) in enumerate(lines.items()):
        bits = sorted(points)
        middle = np.array([points[k].value for k in bits])
        low, high = (np.array([getattr(points[k], side) for k in bits]) for side in ("low", "high"))
        colour = written(viridis(i / max(1, len(lines))))
        around = np.clip(np.stack([middle - low, high - middle]), 0.0, None)
        places = np.array(bits) + (i - len(lines) / 2) * 0.03  # side by side, or intervals hide one another
        axes.errorbar(places, middle, around, color=colour, marker="o", markersize=4, label=name)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xticks(sorted({k for points in lines.values() for k in points}))
    axes.set_xlabel("bits of a code")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    return figure
