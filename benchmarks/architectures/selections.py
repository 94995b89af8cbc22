"""The largest of many, held as another run of a model chose them.

    dense model   topk of [0.3000001, 0.3, ...]   row 0
    packed        topk of [0.3, 0.3000001, ...]   row 1, and all that follows is of another row

The one thing to know: a detector decodes the rows of an image that score best, and a difference in the last
bits may choose another row. With the choice held, outputs compare; what it was worth is kept as ``gap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Selections(TorchDispatchMode):
    """Notes the indices of every ``topk`` in ``made``, or gives those of an earlier run.

    Attributes:
        made: the indices, in the order of the calls.
        gap: how much less than its own choice scores the held one at most, in the largest score.
    """

    def __init__(self, held: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.held = None if held is None else list(held)
        self.made: list[Tensor] = []
        self.gap = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is not torch.ops.aten.topk or not args[0].is_floating_point():
            return out
        own, indices = out
        if self.held is not None:
            at = len(self.made)
            if at >= len(self.held) or self.held[at].shape != indices.shape:
                self.gap = float("inf")  # another number of choices: no longer the same computation
                return out
            dim = args[2] if len(args) > 2 else -1
            indices = self.held[at]
            values = args[0].gather(dim, indices)
            apart = (values.sort(dim).values - own.sort(dim).values).abs().nan_to_num().max().item()
            self.gap = max(self.gap, apart / max(own.abs().nan_to_num(posinf=0.0).max().item(), 1e-6))
            out = (values, indices)
        self.made.append(indices)
        return out
