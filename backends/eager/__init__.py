"""The backend "eager": the model's own forward, and the oracle that interprets a canonical graph.

It needs nothing to be installed, and the other backends are held against it.
"""
