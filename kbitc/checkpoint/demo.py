"""The demo model in the package: where it lies, and its held-out text."""

from __future__ import annotations

from pathlib import Path

CONTEXT = 256
"""Tokens that the demo model was trained to read at once."""


def folder() -> Path:
    """The Hugging Face folder of the demo model."""
    return Path(__file__).parent.parent / "demo_model"


def heldout() -> Path:
    """Text that the demo model was not trained on."""
    return folder() / "heldout.txt"
