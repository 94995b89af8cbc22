"""The command line, one file a command.

Nothing heavy is imported before a command runs, so that ``kbitc --help`` answers at once.
"""

from __future__ import annotations

from kbitc.cli.app import app
from kbitc.cli.main import main

__all__ = ["app", "main"]
