"""The version, for artifacts and the package alike."""

from __future__ import annotations

VERSION = "0.1.0"
