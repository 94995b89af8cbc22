"""How many positions a model has room for: the longest sequence that its tables of positions can number.

The one thing to know: a table with a row for padding numbers positions from behind that row on (RoBERTa:
514 rows, 512 positions).
"""

from __future__ import annotations

from typing import Any

from torch import nn

LIMITS = ("max_position_embeddings", "max_target_positions")
"""What configs call the length of a table; of two, the shorter counts. Zero and -1 mean no limit."""


def usable_positions(model: nn.Module) -> int | None:
    """The longest sequence of tokens that a model takes; None where nothing limits it.

    Args:
        model: of transformers, on any device.
    """
    lengths = _stated(getattr(model, "config", None))
    return min([*lengths, *_numbered(model, set(lengths))], default=None)


def stated_positions(config: Any) -> int | None:
    """The longest sequence that a config of transformers states; None where it states no limit."""
    return min(_stated(config), default=None)


def _stated(config: Any) -> list[int]:
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    stated = [getattr(each, limit, None) for each in (config, text) for limit in LIMITS]
    return [length for length in stated if isinstance(length, int) and length > 0]


def _numbered(model: nn.Module, stated: set[int]) -> list[int]:
    """Positions of tables, of a stated length, whose first ones are the padding's."""
    found = []
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        weight = getattr(module, "weight", None)
        if padding is None or weight is None or "position" not in name.rpartition(".")[2]:
            continue
        if weight.dim() == 2 and weight.shape[0] in stated:
            found.append(weight.shape[0] - padding - 1)
    return found
