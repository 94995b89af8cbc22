"""Tables of measurements, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

Columns = Sequence[tuple[str, str, str]]  # key, title, format of a number


@dataclass
class Section:
    """A table and what stands below it."""

    title: str
    columns: Columns
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def cells(columns: Columns, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of a table as text."""
    return [[_cell(row.get(key), form) for key, _, form in columns] for row in rows]


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else format(value, form)


def print_section(console: Console, section: Section) -> None:
    """A table for a terminal."""
    table = Table(title=section.title, title_justify="left")
    for key, title, _ in section.columns:
        is_name = key in {"name", "spec"}
        is_text = is_name or key in {"wanted", "where", "reason"}
        table.add_column(title, justify="left" if is_text else "right", no_wrap=is_name)
    for line in cells(section.columns, section.rows):
        table.add_row(*line)
    console.print(table)
    for note in section.notes:
        console.print(note, highlight=False)


def markdown(head: Sequence[str], sections: Sequence[Section]) -> str:
    """Everything as Markdown."""
    lines = [*(f"{line}\n" for line in head)]
    for section in sections:
        lines += [f"\n## {section.title}\n", markdown_table(section.columns, section.rows)]
        lines += [f"\n{note}" for note in section.notes]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Columns, rows: Sequence[dict[str, Any]]) -> str:
    """One table as Markdown."""
    body = [[title for _, title, _ in columns], ["---"] * len(columns), *cells(columns, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)
