"""The frame of kbitc's HTML pages: one file, titled sections, tables that sort and filter.

The one thing to know: markup is written in ``templates/`` alone, where Jinja2 escapes whatever is no markup
yet, because names come from checkpoints that nobody vouches for. A page loads nothing and says so to the
browser, which runs no script but ours.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: of the section, plain text.
        html: its body, safe as it stands. An inline SVG belongs in a ``<figure>``.
    """

    title: str
    html: Markup


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: what is read.
        value: a number to sort by, and to align right; None for text.
        code: a name in front of the text.
        share: of the cell's width that a bar takes, instead of text.
        wraps: over several lines; others stay on one.
        is_soft: drawn less loudly, over several lines.
    """

    text: str = ""
    value: float | None = None
    code: str = ""
    share: float | None = None
    wraps: bool = False
    is_soft: bool = False


def page(title: str, subtitle: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: as the heading.
        subtitle: one line below it.
        facts: what to see first: a large value under each name.
        sections: in order; those with an empty body are left out.
    """
    filled = [section for section in sections if section.html]
    is_sortable = any("class=sortable" in section.html for section in filled)
    script = _asset("page.js") if is_sortable else Markup()
    style = _asset("page.css")
    html = render(
        "page",
        title=title,
        subtitle=subtitle,
        facts=facts,
        sections=filled,
        style=style,
        style_hash=_policy_hash(style),
        script=script,
        script_hash=_policy_hash(script),
    )
    return str(html)  # plain, so that nobody's ``replace`` escapes


def _policy_hash(text: str) -> str:
    """As a content-security policy names what may stand in a page."""
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(template: str, **values: object) -> Markup:
    """A template of ours, filled in."""
    # Autoescaping is on: what comes out is safe.
    return Markup(_environment().get_template(f"{template}.html.jinja").render(values))  # noqa: S704


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, name: str = "") -> Markup:
    """A table; with a ``name``, unique on the page, one that sorts and filters. Plain text wraps."""
    cells = [[Cell(c, wraps=True) if isinstance(c, str) else c for c in row] for row in rows]
    heads = [(text, any(row[i].value is not None for row in cells)) for i, text in enumerate(columns)]
    return render("table", name=name, heads=heads, rows=cells)


def number(value: float | None, form: str) -> Cell:
    """A numeric cell; empty without a value."""
    return Cell() if value is None else Cell(format(value, form), value)


def count(value: int) -> Cell:
    """A cell of a whole number."""
    return Cell(f"{value:,}", value)


def code(name: str) -> Cell:
    """A cell of a name on one line."""
    return Cell(code=name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kbitc.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = _pixels
    return environment


def _pixels(value: float) -> str:
    """A length in an SVG: a tenth of a pixel is finer than anybody sees.

    >>> _pixels(12.0), _pixels(3.14159)
    ('12', '3.1')
    """
    return f"{value:.1f}".removesuffix(".0")


def _asset(name: str) -> Markup:
    # Our own file, not a user's text.
    return Markup(resources.files("kbitc.report").joinpath(name).read_text(encoding="utf-8"))  # noqa: S704
