"""How commands speak: tables and JSON on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from kbitc.errors import UsageError
from kbitc.system.files import write_whole

if TYPE_CHECKING:
    from kbitc.graph.context import Progress

out = Console()
err = Console(stderr=True)


class _Left(TimeRemainingColumn):
    """An estimate of the phase's time left, where there is one."""

    def render(self, task: Task) -> Text:
        """Nothing before the first steps."""
        return Text() if task.time_remaining is None else Text("left: ") + super().render(task)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal; yields who is told of the work."""
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        _Left(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    task = bar.add_task(title, total=None)
    phase = ""

    def update(what: str, done: int, total: int) -> None:
        nonlocal phase
        now = what.rpartition(" ")[0] or what
        if now != phase:  # each phase has a speed of its own, and time left of its own
            phase = now
            bar.reset(task)
        name = what if len(what) <= 48 else "…" + what[-47:]
        bar.update(task, description=f"{title}: {name}", completed=done, total=total or None)

    with bar:
        yield update


def write_file(path: Path, text: str) -> None:
    """Write or replace a file in one step; raises UsageError where it cannot be written."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong, in one paragraph, and end with an exit code."""
    err.print(f"[bold red]error[/]: {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
