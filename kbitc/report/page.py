"""The frame of kbitc's HTML pages: one file, titled sections, tables that sort and filter.

The one thing to know: every piece is `Markup`, whose ``format`` and ``join`` escape whatever is not Markup
itself, because names come from checkpoints that nobody vouches for. A page loads nothing and says so to
the browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup, escape

_PAGE = Markup(
    "<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>kbitc: {title}</title>\n"
    "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'\">\n<meta name=viewport content='width=device-width'>"
    "<style>\n{style}</style></head>\n<body>\n<h1>{title}</h1><p class=why>{subtitle}</p>\n"
    "{facts}\n<nav aria-label='On this page'>{links}</nav>\n{sections}\n"
    "{script}</body></html>\n"
)
_SECTION = Markup("<section id=s{number}><h2>{title}</h2>\n{html}\n</section>")


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
        shown: text or Markup.
        value: a number to sort by, and to align right; None for text.
    """

    shown: str
    value: float | None = None


def page(title: str, subtitle: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: as the heading.
        subtitle: one line below it.
        facts: what to see first: a large value under each name.
        sections: in order; those with an empty body are left out.
    """
    shown = [section for section in sections if section.html]
    is_sortable = any("class=sortable" in section.html for section in shown)
    fact = Markup("<div class=fact><b{}>{}</b>{}</div>")
    small = Markup(" class=long")
    return _PAGE.format(
        title=title,
        subtitle=subtitle,
        style=style(),
        script=Markup("<script>\n{}</script>").format(_asset("page.js")) if is_sortable else "",
        facts=Markup("<div class=facts>{}</div>").format(
            join(fact.format(small if len(v) > 16 else "", v, k) for k, v in facts.items())
        ),
        links=join(Markup("<a href='#s{}'>{}</a>").format(i, s.title) for i, s in enumerate(shown)),
        sections=join(_SECTION.format(number=i, title=s.title, html=s.html) for i, s in enumerate(shown)),
    )


def style() -> Markup:
    """The style sheet."""
    return _asset("page.css")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, name: str = "") -> Markup:
    """A table; with a ``name``, unique on the page, one that sorts and filters."""
    button = Markup("<button type=button>{}</button>") if name else Markup("{}")
    head = join(
        Markup("<th scope=col{}>{}</th>").format(
            Markup(" class=n") if any(_is_number(row[i]) for row in rows) else "", button.format(column)
        )
        for i, column in enumerate(columns)
    )
    body = join(Markup("<tr>{}</tr>\n").format(join(map(_cell, row))) for row in rows)
    if not name:
        return Markup(
            "<div class=wide><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
        ).format(head, body)
    return Markup(
        "<p><input type=search id={0}-search placeholder='filter, for example: q_proj nf3' "
        "aria-label='Filter the table'> <span class=why id={0}-count aria-live=polite>{1} rows</span></p>\n"
        "<div class=wide><table class=sortable data-search={0}-search data-count={0}-count>"
        "<thead><tr>{2}</tr></thead>\n<tbody>{3}</tbody></table></div>"
    ).format(name, len(rows), head, body)


def code(text: str) -> Markup:
    """Text as a name is shown."""
    return Markup("<code>{}</code>").format(text)


def bar(share: float, kind: str = "bar") -> Markup:
    """A horizontal bar, ``share`` of the full width."""
    return Markup("<div class='{}'><i style='width:{:.1f}%'></i></div>").format(
        kind, 100 * min(max(share, 0.0), 1.0)
    )


def join(parts: object) -> Markup:
    """Parts in a row, escaped where they are not Markup."""
    return Markup("").join(parts)  # type: ignore[arg-type]  # any iterable of text


def paragraph(text: str, *values: object) -> Markup:
    """A paragraph of a template's text, with values filled in."""
    return Markup("<p class=why>{}</p>").format(escape(text).format(*values))


def _cell(cell: Cell | str) -> Markup:
    if isinstance(cell, str):
        return Markup("<td>{}</td>").format(cell)
    if cell.value is None:
        return Markup("<td class=s>{}</td>").format(cell.shown)
    return Markup("<td class=n data-v='{:.6g}'>{}</td>").format(cell.value, cell.shown)


def _is_number(cell: Cell | str) -> bool:
    return isinstance(cell, Cell) and cell.value is not None


def _asset(name: str) -> Markup:
    # Our own file, not a user's text.
    return Markup(resources.files("kbitc.report").joinpath(name).read_text(encoding="utf-8"))  # noqa: S704
