"""How commands speak: tables and JSON on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from kbitc.errors import UsageError

out = Console()
err = Console(stderr=True)

Update: TypeAlias = Callable[[str, int, int], None]
"""`kbitc.graph.context.Progress`, which is too much to import for a bar."""


class progress:  # noqa: N801  # reads as a function
    """A progress bar on standard error; yields ``update(what, done, total)``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )

    def __enter__(self) -> Update:
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None)
        return self._update

    def _update(self, what: str, done: int, total: int) -> None:
        name = what if len(what) <= 48 else "…" + what[-47:]
        self.bar.update(self.task, description=f"{self.title}: {name}", completed=done, total=total or None)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def write_file(path: Path, text: str) -> None:
    """Raises UsageError where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong, in one paragraph, and end with an exit code."""
    err.print(f"[bold red]error[/]: {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
