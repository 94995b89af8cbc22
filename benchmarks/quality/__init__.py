"""kbitc and its peers at equal stored bits, under one evaluator: `python -m benchmarks.quality`."""
