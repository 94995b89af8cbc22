"""Signals: an exception in the main thread, the end of every child, and what the command makes of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from kbitc.system.stopping import Stopped, WorkerPool, descendants, stoppable

CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def usual_handlers():
    """Shells ignore SIGINT for what runs in the background, and nohup ignores SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exception_once_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stoppable():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # its echo, while what was begun is cleaned up
    assert stopped.value.code == 128 + number
    assert stopped.value.name == number.name
    assert signal.getsignal(number) is before


def test_it_is_no_exception_that_a_retry_would_swallow():
    assert not issubclass(Stopped, Exception)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_children_and_theirs_end():
    with pytest.raises(Stopped), stoppable():
        child = subprocess.Popen([sys.executable, "-c", CHILD])
        until(lambda: len(descendants(child.pid)) == 1)
        (grandchild,) = descendants(child.pid)
        signal.raise_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == -signal.SIGTERM

    def is_gone():
        try:
            stat = open(f"/proc/{grandchild}/stat").read()
        except OSError:
            return True
        return ") Z " in stat  # nobody has asked how it ended

    until(is_gone)


def test_a_pool_drops_what_has_not_begun():
    began = []

    def work(i):
        began.append(i)
        time.sleep(0.05)

    with pytest.raises(Stopped), WorkerPool(1) as pool:
        for _ in pool.map(work, range(1000)):
            raise Stopped(signal.SIGINT)
    assert len(began) < 10
