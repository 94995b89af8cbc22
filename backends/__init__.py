"""Backends: one file each, found by name. The folder is the registry."""

from __future__ import annotations
