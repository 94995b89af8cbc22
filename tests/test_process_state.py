"""Nothing that kbitc runs changes a setting of the whole process: compared before and after every public entry."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

import kbitc


def state():
    """What other code of the process would notice."""
    threads: list[int] = []
    fresh = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return {
        "threads": torch.get_num_threads(),
        "threads of a new thread": threads[0],
        "interop": torch.get_num_interop_threads(),
        "random state": torch.get_rng_state().sum().item(),
        "numpy's": hash(np.random.get_state()[1].tobytes()),
        "python's": hash(random.getstate()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": len(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "standard files": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "recursion": sys.getrecursionlimit(),
        "logging": logging.getLogger().level,
        "streams": (sys.stdout, sys.stderr),
    }


def run_compiled(model, options):
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="kbit", fullgraph=True, options={"inner": "eager", **options})(IDS)
    torch._dynamo.reset()


IDS = torch.arange(8)[None]
ENTRIES = {
    "quantize": lambda model, _: kbitc.quantize(torch.randn(8, 64, generator=torch.Generator()), "nf4:64"),
    "compile by a budget": lambda model, _: kbitc.compile(model, bits=6, calibrate="none"),
    "compile by text of its own": lambda model, _: kbitc.compile(model, bits=6),
    "save and load": lambda model, folder: (
        kbitc.save(kbitc.compile(model, spec="nf4:32"), folder / "out"), kbitc.load(folder / "out"),
        kbitc.load_into(type(model)(model.config), folder / "out"),
    ),
    "torch.compile": lambda model, _: run_compiled(model, {"bits": 8}),
    "torch.compile, not calibrated": lambda model, _: run_compiled(model, {"bits": 6, "calibrate": "none"}),
}  # fmt: skip


def test_a_thread_that_works_alone_does_so_in_torch_too_and_no_other_does():
    from kbitc.kernels.cpu.build import work_alone
    from kbitc.system.stopping import WorkerPool

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        known = state()
        together = threading.Barrier(4)
        with WorkerPool(4, initializer=work_alone) as pool:
            own = list(pool.map(lambda _: together.wait() and None or torch.get_num_threads(), range(4)))
            assert state() == known
        assert own == [1, 1, 1, 1] and state() == known
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_changes_the_process(tiny_model, tmp_path, entry):
    model = tiny_model("llama")
    type(model)(model.config)  # what transformers itself does when it is first used is not ours
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kbitc.load_into  # noqa: B018
        torch.manual_seed(7)
        if entry == "save and load":
            with torch.random.fork_rng():
                known = state()
                ENTRIES[entry](model, tmp_path)
                now = state()
                for name in ("random state", "python's"):  # the module that load_into fills is made here
                    known.pop(name), now.pop(name)
        else:
            known = state()
            ENTRIES[entry](model, tmp_path)
            now = state()
        assert now == known
    finally:
        torch.set_num_threads(before)
