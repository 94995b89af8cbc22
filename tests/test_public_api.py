"""What ``import kbitc`` offers, and what it does not pull in."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kbitc


def test_names():
    assert kbitc.__all__ == [
        "Artifact", "KbitConfig", "KbitTensor", "Spec", "compile", "dequantized", "export_onnx", "load", "load_into",
        "parse_spec", "quantize", "save",
    ]  # fmt: skip
    for name in kbitc.__all__:
        assert getattr(kbitc, name) is not None
        assert name in dir(kbitc)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        kbitc.quantise  # noqa: B018


ROOMS = [
    "kbitc.checkpoint", "kbitc.formats", "kbitc.tensor", "kbitc.graph", "kbitc.pipeline", "kbitc.quantizers",
    "kbitc.passes", "kbitc.backends",
]  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_offers_is_there(room):
    """A name of a file would be the file or the thing in it, by what was imported before."""
    offered = importlib.import_module(room)
    assert offered.__all__
    for name in offered.__all__:
        assert name in dir(offered)
        assert getattr(offered, name) is not None
        assert not any((Path(folder) / f"{name}.py").exists() for folder in offered.__path__), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_that_name'"):
        offered.nothing_of_that_name  # noqa: B018


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_pulls_in_nothing_heavy():
    code = "import sys, kbitc, kbitc.cli; print([m for m in ('torch','transformers','triton','onnx','scipy') if m in sys.modules])"
    assert run(code) == "[]"


def test_importing_passes_pulls_in_no_transformers():
    code = "import sys, kbitc.passes, kbitc.checkpoint; print('transformers' in sys.modules)"
    assert run(code) == "False"


def test_help_answers_quickly():
    best = min(_timed_help() for _ in range(3))
    assert best < 1.5  # 0.3 s on an idle machine


def _timed_help():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kbitc", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start
