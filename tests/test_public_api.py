"""What ``import kbitc`` offers, and what it does not pull in."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kbitc


def test_names():
    assert kbitc.__all__ == [
        "Artifact", "KbitConfig", "KbitTensor", "Spec", "compile", "dequantized", "export_onnx", "load", "load_into",
        "parse_spec", "prepare_for_training", "quantize", "save", "tune",
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


# What one process runs, one after another, and the beginnings of names of modules that are not loaded then.
LIGHT = [
    ("import kbitc, kbitc.cli", ["torch", "transformers", "triton", "onnx", "scipy"]),
    ("import kbitc.checkpoint", ["transformers", "gguf", "huggingface_hub", "safetensors"]),
    ("import kbitc.passes", ["transformers", "kbitc.passes."]),
    ("from kbitc.passes import Canonicalize, Pass, PassManager, default_pipeline", ["transformers"]),
    (
        "import kbitc.backends as b; b.backend_names(); b.find_backend('eager')",
        ["transformers", "onnx", "onnx_ir", "kbitc.backends.cpu.backend", "torch._inductor.codecache"],
    ),
]


def test_importing_pulls_in_nothing_heavy():
    """Of the whole, and of each room; finding one backend loads that one alone."""
    code = "import json, sys\nfor line in json.loads(sys.argv[1]): exec(line); print(*sys.modules)"
    lines = json.dumps([line for line, _ in LIGHT])
    done = subprocess.run([sys.executable, "-c", code, lines], capture_output=True, text=True, check=True)
    loaded = [printed.split() for printed in done.stdout.splitlines()]
    for (line, heavy), names in zip(LIGHT, loaded, strict=True):
        found = [name for name in names for begin in heavy if is_part(name, begin)]
        assert found == [], line
    assert "kbitc.backends.eager.backend" in loaded[-1]


def is_part(name, begin):
    """Whether a module is that one, or in that package."""
    return name == begin or name.startswith(begin.removesuffix(".") + ".")


def test_help_answers_quickly():
    best = min(_timed_help() for _ in range(3))
    assert best < 1.5  # 0.3 s on an idle machine


def _timed_help():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kbitc", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start
