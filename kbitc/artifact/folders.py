"""Names inside an artifact's folder, and the folder itself: who may write it, and how it comes into place.

While a folder ``OUT`` is made, ``.OUT.partial`` stands beside it: ``lock``, which one process holds;
``new``, the folder as it will be; and what its writer needs to go on after an interruption. ``new`` takes
OUT's name in one step, an old OUT taking ``new``'s. Only then is ``.OUT.partial`` removed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from kbitc.errors import SourceError, UsageError
from kbitc.system import files

FORMAT = 1
PLAN_FILE = "kbit_plan.json"
REPORT_FILE = "report.html"

_LOCK, _NEW, _OLD, _PLACED = "lock", "new", "old", "placed"


def is_artifact(folder: Path) -> bool:
    """Whether a folder, if it is one, holds a compiled model."""
    return files.exists(folder / PLAN_FILE)


def check_target(out: Path, *, is_forced: bool, marker: str = PLAN_FILE) -> None:
    """Refuse early what a :class:`FolderClaim` could not put in place.

    Args:
        out: the folder to be written.
        is_forced: it may exist, if it is one of ours.
        marker: the file that ours hold.

    Raises:
        UsageError: the folder exists and is not an artifact to replace, or its parent is not writable.
    """
    if files.exists(out):
        if not is_forced:
            raise UsageError(f"{out}: exists already; pass --force to replace it, or choose another -o")
        if not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(
                f"{out}: is not a kbitc artifact (it holds no {marker}), so --force will not replace it; "
                "remove it yourself or choose another -o"
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{out}: {parent} is not a writable folder; choose another -o")


class FolderClaim:
    """The right to write one folder, which one process has at a time; a context manager.

    On leaving, an error removes what was begun. An interruption (what is no ``Exception``) keeps it, if the
    one who began it can go on from there. What an earlier run left stays until this one begins.

    Args:
        out: the folder; where it is a symbolic link, what that points to.
        is_forced: it may exist, if it is one of ours.
        is_resumed: it may be one that an interrupted run had just put in place.
        is_resumable: keep what was begun when interrupted.
        marker: the file that ours hold.

    Attributes:
        state: ``.OUT.partial``.
        new: the folder to fill.
        is_placed: an earlier run was interrupted after it had put the folder in place, so that nothing is
            left but to remove ``state``.

    Raises:
        UsageError: another process writes the folder, or see :func:`check_target`.
    """

    def __init__(
        self,
        out: Path,
        *,
        is_forced: bool = False,
        is_resumed: bool = False,
        is_resumable: bool = False,
        marker: str = PLAN_FILE,
    ) -> None:
        self.shown, self.marker = out, marker
        self.out = Path(os.path.realpath(out))
        self.state = self.out.with_name(f".{self.out.name}.partial")
        self.is_forced, self.is_resumable, self.has_begun = is_forced, is_resumable, False
        self._trash = self.out.with_name(f".{self.out.name}.old")
        self._made: list[Path] = []
        self._check(is_resumed)
        self._lock = self._locked()
        try:
            self._recover()
            self._check(is_resumed)  # again: only now may nobody else change it
        except BaseException:
            self.close()
            raise

    @property
    def new(self) -> Path:
        """The folder to fill; after an earlier run has put it in place, one that nobody will see."""
        return self.state / ("again" if self.is_placed else _NEW)

    def _locked(self) -> files.Lock:
        path = self.state / _LOCK
        try:
            self._made = [self.state, *(p for p in self.state.parents if not p.exists())]
            while True:
                self.state.mkdir(parents=True, exist_ok=True)
                try:
                    return files.Lock.take(path)
                except FileNotFoundError:  # its last holder removed the folder in between
                    continue
        except files.LockHeld as error:
            holder = f"process {error.holder}" if error.holder else "another process"
            raise UsageError(
                f"{self.shown}: is being written by {holder}; wait for it to end, or choose another -o"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{self.shown}: cannot be written: {error.strerror or error}; choose another -o"
            ) from error

    def _check(self, is_resumed: bool) -> None:
        mark = self._mark()
        self.is_placed = is_resumed and mark is not None and mark == _identity(self.out)
        check_target(self.shown, is_forced=self.is_forced or self.is_placed, marker=self.marker)

    def _recover(self) -> None:
        """After a kill: give an old folder back its name, remove what was to be removed."""
        old = self.state / _OLD
        if old.exists() and not self.out.exists():
            old.rename(self.out)
        files.remove(self._trash)

    def begin(self) -> Path:
        """Remove what an earlier run left, and make the folder to fill.

        Raises:
            UsageError: see :func:`check_target`.
            OSError: it cannot be made.
        """
        check_target(self.shown, is_forced=self.is_forced, marker=self.marker)
        self.has_begun, self.is_placed = True, False
        self._clear()
        self.new.mkdir()
        return self.new

    def go_on(self) -> Path:
        """Take over what an earlier run left, if it is whole; the folder to fill.

        Raises:
            FileNotFoundError: the folder that it had begun is not there any more.
        """
        if self.is_placed:
            self.new.mkdir(exist_ok=True)
        elif self._mark() not in (None, _identity(self.new)) or not self.new.is_dir():
            raise FileNotFoundError(self.new)  # "new" may be the old folder, which had exchanged names
        self.has_begun = True
        return self.new

    def put_in_place(self) -> None:
        """Give the new folder its name, and remove the old one and ``state``.

        Raises:
            UsageError: the folder has come to exist, and may not be replaced.
            OSError: it cannot be renamed.
        """
        if not self.is_placed:
            check_target(self.shown, is_forced=self.is_forced, marker=self.marker)
            self._write_mark()
            if not self.out.exists():
                self.new.rename(self.out)
            elif not files.exchange(self.new, self.out):
                self.out.rename(self.state / _OLD)
                self.new.rename(self.out)
        # One step again: half of ``state`` must not look like something to go on with.
        files.remove(self._trash)
        try:
            self.state.rename(self._trash)
        except OSError:
            self._clear()
        files.remove(self._trash)

    def _write_mark(self) -> None:
        scratch = self.state / f"{_PLACED}.part"
        scratch.write_text(_identity(self.new) or "", encoding="ascii")
        scratch.replace(self.state / _PLACED)

    def _mark(self) -> str | None:
        """The identity of the folder that an earlier run was putting in place."""
        try:
            with files.reading(self.state / _PLACED) as handle:
                return handle.read().decode("ascii")
        except (SourceError, ValueError):
            return None

    def _clear(self) -> None:
        for path in self.state.iterdir():
            if path.name != _LOCK:
                files.remove(path)

    def close(self, error: type[BaseException] | None = None) -> None:
        """Let another process write the folder; ``error`` is what ended the work, if anything did."""
        is_ours = self._lock.is_there()  # not once it is in place: ``state`` may be another process's then
        is_dropped = error is not None and (issubclass(error, Exception) or not self.is_resumable)
        if self.has_begun and is_dropped and is_ours:
            self._clear()
        with contextlib.suppress(OSError):
            if is_ours and [path.name for path in self.state.iterdir()] == [_LOCK]:
                (self.state / _LOCK).unlink()
                for path in self._made:  # the folder, and those around it that did not exist
                    path.rmdir()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind)


def _identity(folder: Path) -> str | None:
    """What stays when a folder is renamed; None where there is none."""
    try:
        about = folder.stat()
    except OSError:
        return None
    return f"{about.st_dev} {about.st_ino}"
