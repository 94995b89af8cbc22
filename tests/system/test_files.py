"""Locks, exchanged names and whole files, and that a killed process holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kbitc.checkpoint.safetensors_file import header_bytes, read_bytes
from kbitc.errors import SourceError
from kbitc.system import checksums, files
from kbitc.system.json_file import read_json

HOLDER = """
import sys, time
from pathlib import Path
from kbitc.system.files import Lock
Lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_holds_a_lock_and_the_kernel_lets_go_of_it(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(files.LockHeld) as held:
        files.Lock.take(path)
    assert held.value.holder == str(process.pid)
    process.kill()
    process.wait()
    files.Lock.take(path).release()


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path):
    """Who waits for a holder that removes the file gets the file that is there afterwards."""
    path = tmp_path / "lock"
    first = files.Lock.take(path)
    path.unlink()
    second = files.Lock.take(path)
    assert not first.is_there()
    assert second.is_there()
    with pytest.raises(files.LockHeld):
        files.Lock.take(path)
    first.release()
    second.release()


def folder(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_names_are_exchanged(tmp_path):
    one, two = folder(tmp_path / "one", "1"), folder(tmp_path / "two", "2")
    if not files.exchange(one, two):
        pytest.skip("this file system cannot exchange names")
    assert (one / "file").read_text() == "2"
    assert (two / "file").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        files.exchange(one, tmp_path / "three")


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path, link = tmp_path / "file", tmp_path / "link"
    files.write_whole(path, "first")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_whole(link, "second")
    assert link.is_symlink()
    assert path.read_text() == "second"
    assert path.stat().st_mode & 0o777 == 0o640

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, "third")
    assert path.read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_device_is_written_to():
    files.write_whole(files.Path(os.devnull), "text")
    assert not os.path.isfile(os.devnull)


READERS = {
    "json": read_json,
    "digest": checksums.digest_of_file,
    "part": lambda path: checksums.digest_of_part(path, 0, 8),
    "fingerprint": lambda path: checksums.fingerprint({path: [(0, 8)]}),
    "bytes": lambda path: read_bytes(path, 0, 8),
    "header": header_bytes,
}


@pytest.mark.parametrize("way", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path, way, impatient):
    """Nobody writes to it; a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device", "."):
        with pytest.raises(SourceError, match="is no regular file; put the file itself there"):
            READERS[way](tmp_path / name)
    (tmp_path / "circle").symlink_to("circle")
    for name, message in (("circle", "cannot be read"), ("a" * 300, "cannot be read"), ("a\0b", "null byte")):
        with pytest.raises(SourceError, match=message):
            READERS[way](tmp_path / name)


def test_what_is_read_may_be_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"0123")
    (tmp_path / "link").symlink_to("file")
    with files.reading(tmp_path / "link") as handle:
        assert handle.read() == b"0123"


def test_what_can_have_no_name_is_not_there(tmp_path):
    assert files.exists(tmp_path)
    assert not any(files.exists(tmp_path / name) for name in ("gone", "a" * 300, "a/" * 3000, "a\0b"))
