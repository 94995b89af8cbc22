"""Backends by name: what is found, who asks what is missing, and what writes a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from kbitc.backends import (
    AUTO,
    Backend,
    Decoder,
    Decoding,
    Exporting,
    _finding,
    backend_names,
    export_formats,
    find_backend,
    find_exporter,
    make_decoder,
)
from kbitc.errors import BackendUnavailable, UsageError
from kbitc.pipeline.registry import Registry


@dataclass(frozen=True)
class Absent:
    """Decodes and exports where a package is installed, which it never is."""

    format: ClassVar[str] = "flat"

    def missing(self):
        return "flatlib is not installed"

    def decoder(self, model):
        raise AssertionError("asked although something is missing")

    def export(self, model, folder, *, force=False):
        raise AssertionError("asked although something is missing")


@pytest.fixture
def others(monkeypatch):
    """``others[name] = class`` registers one more backend."""
    added = {}
    names, load = Registry.names, Registry.load
    monkeypatch.setattr(Registry, "names", lambda self: sorted({*names(self), *added}))
    monkeypatch.setattr(
        Registry, "load", lambda self, name: added[name] if name in added else load(self, name)
    )
    return added


def test_names():
    assert {"cpu", "dynamo", "eager", "onnx_export"} <= set(backend_names())
    assert not any(name.startswith("_") for name in backend_names())
    assert AUTO not in backend_names()
    with pytest.raises(UsageError, match="did you mean 'cpu'"):
        find_backend("cqu")


def test_each_of_ours_is_a_backend():
    kinds = {name: _finding.BACKENDS.load(name)() for name in ("cpu", "dynamo", "eager", "onnx_export")}
    assert all(isinstance(backend, Backend) for backend in kinds.values())
    assert [name for name, backend in kinds.items() if isinstance(backend, Decoding)] == ["cpu", "eager"]
    assert [name for name, backend in kinds.items() if isinstance(backend, Exporting)] == ["onnx_export"]


def test_what_is_missing_is_asked_before_anything_else(tiny_model, others):
    others["absent"] = Absent
    for use in (
        lambda: find_backend("absent"),
        lambda: make_decoder(tiny_model("llama"), "absent"),
        lambda: find_exporter("flat"),
    ):
        with pytest.raises(BackendUnavailable, match="backend 'absent' cannot be used here: flatlib is not"):
            use()


def test_a_class_that_says_nothing_of_what_it_misses(others):
    others["mute"] = object
    with pytest.raises(BackendUnavailable, match="'mute' has no method missing"):
        find_backend("mute")


def test_what_writes_a_format(others):
    pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    assert type(find_exporter("onnx")) is find_backend("onnx_export")
    others["absent"] = Absent
    assert export_formats() == ["compressed-tensors", "flat", "gguf", "onnx"]
    with pytest.raises(
        UsageError,
        match=r"no format 'onx'; did you mean 'onnx'\? \(known: compressed-tensors, flat, gguf, onnx\)",
    ):
        find_exporter("onx")
    others["other"] = type("Other", (Absent,), {"format": "onnx", "missing": lambda self: None})
    with pytest.raises(UsageError, match="by the backends 'onnx_export' and 'other'; name one"):
        find_exporter("onnx")
    assert type(find_exporter("onnx_export")) is find_backend("onnx_export")
    assert type(find_exporter("other")) is others["other"]


def test_what_does_not_decode_names_what_does(tiny_model):
    with pytest.raises(UsageError, match="'onnx_export' does not decode; use one that does: cpu, eager"):
        pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
        make_decoder(tiny_model("llama"), "onnx_export")
    assert type(make_decoder(tiny_model("llama"), "eager")) is Decoder
