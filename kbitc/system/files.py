"""Files and folders that are there whole or not at all: replaced in one step, and locked while they are made.

The one thing to know: the operating system lets go of a :class:`Lock` however its process ends, so a lock
that is found on disk means nothing by itself. What is read back goes through :func:`reading`, which waits for
no pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kbitc.errors import SourceError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_log = logging.getLogger(__name__)


class LockHeld(Exception):
    """Another process, or another thread of this one, holds the lock.

    Attributes:
        holder: its process id, as text; empty where it is not known.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@dataclass
class Lock:
    """A file that is locked from :meth:`take` to :meth:`release`, or to the end of the process."""

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path, *, waits: bool = False) -> Lock:
        """Lock a file, which is made if need be.

        Args:
            path: of the file; its folder exists.
            waits: for whoever holds it.

        Raises:
            LockHeld: somebody does, and this one does not wait.
            OSError: the file cannot be made.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _flock(descriptor, path, waits=waits)
                lock = cls(path, descriptor)
                if lock.is_there():
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                    return lock
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the holder removed the file before it let go: there is another one now

    def is_there(self) -> bool:
        """Whether the file of that name is still the one that is locked."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go; the file stays unless the caller has removed it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _flock(descriptor: int, path: Path, *, waits: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise LockHeld(os.pread(descriptor, 32, 0).decode("ascii", "replace")) from error
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        _log.warning("%s: this file system has no locks; let only one process write there", path)


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two files or folders in one step; False where the system cannot.

    Raises:
        OSError: one is not there, or they may not be renamed.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def remove(path: Path) -> None:
    """Remove a file, link or folder as far as that can be done; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def exists(path: Path) -> bool:
    """Whether a file or folder is there: no, where none can have such a name (``Path.exists`` raises)."""
    try:
        return path.exists()
    except ValueError:  # a NUL
        return False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


@contextlib.contextmanager
def reading(path: Path) -> Iterator[io.FileIO]:
    """A regular file, or a link to one, open and unbuffered; what fails while it is read fails as below.

    Raises:
        SourceError: it cannot be read, or is a pipe, socket or device, which may never end or never begin.
    """
    try:
        # A pipe is opened as well without waiting for who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:
        raise SourceError(f"{str(path)!r:.200}: is no name of a file: {error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceError(f"{path}: is no regular file; put the file itself there")
        with io.FileIO(descriptor, closefd=False) as handle:
            yield handle
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {error.strerror or error}")


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file, or replace one, in one step; devices and pipes are written to as they are.

    Raises:
        OSError: it cannot be written; an earlier file is still there.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_text(text, encoding="utf-8")
        return
    target = Path(os.path.realpath(path))  # a link stays one
    with scratch_beside(target) as scratch:
        scratch.write_text(text, encoding="utf-8")
        if target.exists():
            scratch.chmod(stat.S_IMODE(target.stat().st_mode))
        scratch.replace(target)


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A name in the same folder to write under and to rename from; what is left there is removed."""
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)
