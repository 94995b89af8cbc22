"""Engines: each item once, read ahead, errors as they are; and what is asked of one that is not there."""

from __future__ import annotations

import sys
import threading
from contextlib import closing

import pytest

from kbitc.errors import BackendUnavailable, UsageError
from kbitc.system.engine import engine_of
from kbitc.system.work import IN_PROCESS


class Squares:
    """Of numbers, with a log of what was done when."""

    def __init__(self):
        self.log = []

    def load(self, item):
        self.log.append(("load", item, threading.current_thread() is threading.main_thread()))
        if item < 0:
            raise UsageError(f"{item} is below 0")
        return item

    def finish(self, item, loaded):
        self.log.append(("finish", item))
        return loaded**2


def test_results_in_order_and_one_item_ahead():
    work = Squares()
    assert list(IN_PROCESS.run(work, [3, 1, 2])) == [(0, 9), (1, 1), (2, 4)]
    assert [entry[1] for entry in work.log if entry[0] == "finish"] == [3, 1, 2]
    assert ("load", 3, False) in work.log, "in another thread"
    assert list(IN_PROCESS.run(work, [])) == []


def test_whoever_stops_early_begins_no_more():
    work = Squares()
    with closing(IN_PROCESS.run(work, range(100))) as results:
        assert next(results) == (0, 0)
    assert sum(entry[0] == "load" for entry in work.log) <= 2


def test_errors_come_as_they_are():
    with pytest.raises(UsageError, match="-1 is below 0"):
        list(IN_PROCESS.run(Squares(), [1, -1, 2]))


def test_engines_that_are_not_there(monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'ray'"), engine_of("rai"):
        pass
    with pytest.raises(UsageError, match="add --engine ray"), engine_of("process", "auto"):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)  # whether it is installed or not
    with pytest.raises(BackendUnavailable, match=r"kbitc\[ray\]"), engine_of("ray"):
        pass
