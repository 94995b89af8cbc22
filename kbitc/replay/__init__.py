"""One replay of a captured graph over all calibration inputs, with two values on every edge.

The source model's value and the partly quantized one's: a node that reads a weight is where that weight is
quantized, with both inputs at hand.
"""
