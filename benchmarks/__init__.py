"""Measurements: `python -m benchmarks.NAME`; tables out, nothing gated by time."""
