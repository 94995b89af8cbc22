"""`python -m benchmarks.cpu_linear`; see `benchmarks.cpu_linear.__main__`."""
