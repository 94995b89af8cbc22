"""Mutated files through the command line and the Python interface; see `benchmarks.fuzz.__main__`."""
