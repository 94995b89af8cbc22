"""Second moments of the inputs of adapted layers: what errors in their weights do to their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.sensitivity.gram import Gram

MOST_BYTES = 2**28
"""Of moments that are held at once; layers beyond it take another pass of the text."""


def chunks(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Paths of layers whose moments fit into memory together, in order."""
    chunk: list[str] = []
    size = 0
    for path, layer in layers.items():
        own = 4 * int(getattr(layer, "in_features", 0)) ** 2
        if chunk and size + own > MOST_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(path)
        size += own
    if chunk:
        yield chunk


@torch.no_grad()
def input_moments(
    model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Gram]:
    """The mean of x x^T over tokens, of each layer that takes floats.

    Args:
        model: in eval mode.
        layers: parts of it, by path.
        batches: to run it on; none gives an empty answer.

    Returns:
        Moments ``(in_features, in_features)`` float32 by path.
    """
    sums: dict[str, tuple[Tensor, int]] = {}
    hooks = [layer.register_forward_pre_hook(_counting(sums, path)) for path, layer in layers.items()]
    try:
        for batch in batches:
            given = {name: value for name, value in batch.items() if name != "labels"}
            model(**given, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: Gram(total / count, tokens=count) for path, (total, count) in sums.items()}


def _counting(sums: dict[str, tuple[Tensor, int]], path: str) -> Any:
    def add(_: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        if not x.is_floating_point():
            return
        rows = x.float().flatten(0, -2)
        total, count = sums.get(path, (torch.zeros(rows.shape[1], rows.shape[1]), 0))
        sums[path] = total.addmm_(rows.mT, rows), count + len(rows)

    return add
