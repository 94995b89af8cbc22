"""Matplotlib's figures on a page: as an inline SVG that needs nothing, and as a PNG file beside the page.

The one thing to know: a page's policy lets no attribute style anything and loads nothing. So an SVG is taken
apart, and what is drawn is written again by a template, with styles as attributes and without links.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET  # of what matplotlib has just drawn

from markupsafe import Markup

from kbitc.errors import BackendUnavailable, UsageError
from kbitc.report.page import render
from kbitc.system.files import scratch_beside

DRAWN = {"svg", "g", "path", "use", "text", "defs", "rect", "circle", "line", "polyline", "polygon", "tspan"}
DOTS = 150  # an inch of a PNG
_LINK = "{http://www.w3.org/1999/xlink}href"
_INK = re.compile(r"#000000|black")


@dataclass(frozen=True)
class _Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[_Element] = field(default_factory=list)


def new_figure(width: float = 9.0, height: float = 4.6) -> tuple[Any, Any]:
    """A figure of one plot, in inches, and its axes.

    Raises:
        BackendUnavailable: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("plots are drawn by matplotlib; pip install 'kbitc[sweep]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def inline(figure: Any, name: str, summary: str) -> Markup:
    """A figure as an SVG in a page.

    Args:
        figure: of matplotlib.
        name: unique on the page.
        summary: what it shows, as its caption and for screen readers.
    """
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(drawn.getvalue())  # noqa: S314
    box = root.get("viewBox", "0 0 1 1")
    children = [made for child in root for made in _drawn(child, name)]
    return render("figure", box=box, elements=children, summary=summary)


def write_png(figure: Any, path: Path) -> None:
    """A figure as a file, replaced in one step.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with scratch_beside(path) as scratch:
            figure.savefig(scratch, format="png", dpi=DOTS, facecolor="white", metadata={"Software": None})
            scratch.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _drawn(element: ET.Element, name: str) -> Iterator[_Element]:
    """An element as the page has it; none for what draws nothing."""
    tag = element.tag.rpartition("}")[2]
    if tag not in DRAWN:
        return
    attributes = {key: value for key, value in element.attrib.items() if "}" not in key}
    for part in filter(None, (part.strip() for part in attributes.pop("style", "").split(";"))):
        key, _, value = part.partition(":")
        attributes[key.strip()] = value.strip()
    attributes.pop("clip-path", None)  # limits of the axes are wider than what is drawn
    font = attributes.pop("font", None)
    if font is not None:  # "10px 'DejaVu Sans', ..."
        attributes["font-size"] = font.split("px")[0] + "px"
    for key in ("fill", "stroke"):
        if key in attributes:
            attributes[key] = _INK.sub("currentColor", attributes[key])
    if "id" in attributes:
        attributes["id"] = f"{name}-{attributes['id']}"
    if _LINK in element.attrib:
        attributes["href"] = f"#{name}-{element.attrib[_LINK].removeprefix('#')}"
    if tag == "path" and "stroke" not in attributes and "fill" not in attributes:
        attributes["fill"] = "currentColor"
    children = [made for child in element for made in _drawn(child, name)]
    yield _Element(tag, attributes, (element.text or "").strip(), children)
