"""A tiny model with random weights of every class that transformers has, compiled, loaded and compared."""
