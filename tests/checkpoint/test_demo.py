"""The model in the package."""

from __future__ import annotations

from kbitc.checkpoint import demo


def test_the_demo_model_is_small_and_has_its_text():
    size = sum(p.stat().st_size for p in demo.folder().iterdir())
    assert size <= 8_000_000
    assert demo.heldout().stat().st_size > 20_000
