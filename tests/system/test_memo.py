"""What is made once for a key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

from kbitc.system.memo import Memo


def test_threads_that_want_the_same_make_it_once():
    memo = Memo()
    started, made = Event(), []

    def make() -> int:
        made.append(0)
        started.wait(0.2)  # time enough for the others to ask
        return len(made)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: memo.once("key", make), range(4)))
    assert found == [1] * 4
    assert memo.once("other", lambda: 7) == 7
