"""How large the inputs of a model's adapted layers are: what an error in each input feature costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def input_squares(adapted: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean squared input of each adapted layer that takes floats.

    Args:
        adapted: a ``PeftModel`` in eval mode.
        batches: to run it on; none gives an empty answer.

    Returns:
        ``(in_features,)`` float32 by the layer's path in the bare model; above 0 throughout.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    sums: dict[str, Tensor] = {}
    base = adapted.get_base_model()
    layers = (
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "parameter_name")
    )
    hooks = [base.get_submodule(path).register_forward_pre_hook(_counting(sums, path)) for path, _ in layers]
    try:
        for batch in batches:
            given = {name: value for name, value in batch.items() if name != "labels"}
            adapted(**given, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / total.mean().clamp_min(1e-30) + 1e-6 for path, total in sums.items()}


def _counting(sums: dict[str, Tensor], path: str) -> Any:
    def add(_: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        if x.is_floating_point():
            here = x.float().flatten(0, -2).square().sum(0)
            sums[path] = sums[path] + here if path in sums else here

    return add
