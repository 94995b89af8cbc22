"""Fixtures of the backends' tests."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture
def fresh_dynamo(monkeypatch):
    """No graph, no count and no compiled code of an earlier test."""
    # pytest would format and keep each of its records: a third of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_kept_steps(tmp_path_factory, monkeypatch):
    """Every test traces its models itself, whatever earlier runs left."""
    folder = tmp_path_factory.mktemp("cache") / "decode"
    monkeypatch.setattr("kbitc.backends.cpu.native_keeping.kept_folder", lambda: folder)
