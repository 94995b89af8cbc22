"""Decoding token by token, as backends share it: the loop, the cache, the traced step.

It is no backend, so its name begins with an underscore.
"""
