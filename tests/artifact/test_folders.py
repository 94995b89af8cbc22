"""One process writes a folder at a time, and a kill between any two steps loses nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from kbitc.artifact.folders import PLAN_FILE, FolderClaim
from kbitc.artifact.writer import Writer
from kbitc.errors import UsageError
from kbitc.formats.layout import Slot

DATA = {"a": {"a.planes": torch.arange(9, dtype=torch.uint8)}, "b": {"b": torch.ones(5)}}
SLOTS = {u: {k: Slot(t.dtype, tuple(t.shape)) for k, t in parts.items()} for u, parts in DATA.items()}
KILLED = 9


def write(out, *, text="{}", identity=1, **options):
    with Writer(out, SLOTS, {"id": identity}, **options) as writer:
        for unit, tensors in DATA.items():
            if unit not in writer.done:
                writer.put(unit, {key: tensor * identity for key, tensor in tensors.items()}, {})
        (writer.partial / "companion.txt").write_text("beside")
        writer.commit({PLAN_FILE: text})
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_at(step, folder, job):
    """Run a job in a process that ends before its n-th operation on files of a folder; True if it did."""
    child = os.fork()
    if child == 0:
        operations = itertools.count()

        def hook(event, arguments):
            is_ours = event.startswith(("os.", "open", "shutil.")) and str(folder) in repr(arguments)
            if (is_ours or event == "ctypes.dlsym") and next(operations) == step:
                os._exit(KILLED)

        sys.addaudithook(hook)
        try:
            job()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("is_forced", [False, True])
def test_a_kill_before_any_step_can_be_resumed(is_forced, can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr("kbitc.system.files.exchange", lambda *_: False)
    old = contents(write(tmp_path / "old", text="old"))
    new = contents(write(tmp_path / "whole", identity=2))
    seen = set()
    for step in itertools.count():
        folder = tmp_path / f"{step}"
        folder.mkdir()
        out = folder / "out"
        if is_forced:
            write(out, text="old")
        is_killed = killed_at(step, folder, lambda: write(out, identity=2, is_forced=is_forced))  # noqa: B023
        there = contents(out) if out.exists() else None
        allowed = [new, *([old] if is_forced else []), *([] if is_forced and can_exchange else [None])]
        assert there in allowed, "half of something, or nothing"
        seen.add(there == new)
        if is_killed and hidden(folder) == [".out.partial"]:
            write(out, identity=2, is_resumed=True, is_forced=is_forced)
        elif not out.exists():
            write(out, identity=2)
        elif there == old:
            write(out, identity=2, is_forced=True)
        assert contents(out) == new
        # What a kill during the last removal left goes with the next run.
        write(out, is_forced=True)
        assert hidden(folder) == []
        if not is_killed:
            break
    assert step > 20
    assert seen == {True, False}


def test_with_exchange_an_old_folder_is_never_away(tmp_path, monkeypatch):
    """Whatever renames there are: after each, the name stands."""
    from kbitc.system import files

    write(tmp_path / "out", text="old")
    if not files.exchange(tmp_path / "out", write(tmp_path / "other")):
        pytest.skip("this file system cannot exchange names")
    rename = Path.rename

    def watched(self, target):
        made = rename(self, target)
        assert (tmp_path / "out" / PLAN_FILE).exists()
        return made

    monkeypatch.setattr(Path, "rename", watched)
    write(tmp_path / "out", is_forced=True)


def test_a_second_writer_is_refused_and_the_first_is_whole(tmp_path):
    whole = contents(write(tmp_path / "whole"))
    with Writer(tmp_path / "out", SLOTS, {"id": 1}) as writer:
        writer.put("a", DATA["a"], {})
        for options in ({}, {"is_resumed": True}, {"is_forced": True}):
            with pytest.raises(UsageError, match=f"is being written by process {os.getpid()}; wait"):
                write(tmp_path / "out", **options)
        writer.put("b", DATA["b"], {})
        (writer.partial / "companion.txt").write_text("beside")
        writer.commit({PLAN_FILE: "{}"})
    assert contents(tmp_path / "out") == whole
    assert hidden(tmp_path) == []


def test_the_holder_is_named_whatever_path_it_was_given(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom kbitc.artifact.folders import FolderClaim\n"
    code += "with FolderClaim(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    (tmp_path / "link").symlink_to(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "link")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "\n"
    with pytest.raises(UsageError, match=f"out: is being written by process {process.pid}"):
        FolderClaim(tmp_path / "out")
    process.kill()
    process.wait()
    write(tmp_path / "link")  # what the dead one held is free
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / PLAN_FILE).exists()


def test_an_early_error_leaves_an_earlier_run_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", SLOTS, {"id": 1}) as writer:
        writer.put("a", DATA["a"], {})
        raise KeyboardInterrupt
    with pytest.raises(ValueError), FolderClaim(tmp_path / "out"):
        raise ValueError  # no such model, say
    with Writer(tmp_path / "out", SLOTS, {"id": 1}, is_resumed=True) as writer:
        assert set(writer.done) == {"a"}
        writer.put("b", DATA["b"], {})
        writer.commit({PLAN_FILE: "{}"})


def test_nothing_is_left_where_nothing_was_begun(tmp_path):
    with pytest.raises(ValueError), FolderClaim(tmp_path / "not" / "yet" / "out"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_who_cannot_go_on_keeps_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), FolderClaim(tmp_path / "out") as claim:
        (claim.begin() / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_resume_does_not_take_the_old_folder_for_a_new_one(tmp_path):
    """Killed after the exchange, and then OUT is removed: what lies in its place is the old one."""
    write(tmp_path / "out", text="old")
    for step in itertools.count():
        is_killed = killed_at(step, tmp_path, lambda: write(tmp_path / "out", identity=2, is_forced=True))
        partial = tmp_path / ".out.partial"
        if (partial / "placed").exists() and (partial / "new" / PLAN_FILE).read_text() == "old":
            break
        assert is_killed, "no step between the exchange and the end"
        write(tmp_path / "out", text="old", is_forced=True)
    shutil.rmtree(tmp_path / "out")
    write(tmp_path / "out", identity=2, is_resumed=True)
    assert contents(tmp_path / "out") == contents(write(tmp_path / "whole", identity=2))


def test_a_folder_that_can_have_no_such_name(tmp_path):
    with pytest.raises(UsageError, match=r"File name too long; choose another -o"):
        FolderClaim(tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == []
