"""Full second moments, and what is made of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch

from kbitc.sensitivity.gram import Gram


def test_threads_that_want_the_same_make_it_once():
    gram = Gram(torch.eye(3))
    started, made = Event(), []

    def make() -> int:
        made.append(0)
        started.wait(0.2)  # time enough for the others to ask
        return len(made)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gram.once("key", make), range(4)))
    assert found == [1] * 4
    assert gram.once("other", lambda: 7) == 7
