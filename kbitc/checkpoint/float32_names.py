"""What a transformers model computes in float32, whatever dtype it is loaded in.

The one thing to know: a model class says so by patterns, which transformers searches for anywhere in a name.
"""

from __future__ import annotations

import re

import torch
from torch import nn

LISTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Patterns that hold for models in float16, and for those in bfloat16 too."""


def float32_names(model: nn.Module, dtype: torch.dtype = torch.float16) -> set[str]:
    """Names of the parameters and buffers that stay in float32 when the rest is of ``dtype``.

    Args:
        model: of transformers, or with such models inside; others have none.
        dtype: 16 bits, or wider for none.
    """
    lists = {torch.float16: LISTS, torch.bfloat16: LISTS[1:]}.get(dtype, ())
    names: set[str] = set()
    for path, module in model.named_modules():
        patterns = {pattern for own in lists for pattern in getattr(module, own, None) or ()}
        if not patterns:
            continue
        asked = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in sorted(patterns)))
        tensors = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        names |= {f"{path}.{name}".lstrip(".") for name, _ in tensors if asked.search(name)}
    return names
