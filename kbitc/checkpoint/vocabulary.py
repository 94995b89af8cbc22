"""How many tokens a model knows."""

from __future__ import annotations

from typing import Any

from torch import nn


def vocabulary_size(model: Any) -> int | None:
    """How many tokens a model reads and gives; None for a model without any.

    What the config states comes first: the table that is looked up may have more rows, of prompts (CPM-Ant),
    images (Mllama) or padding (Moshi), which are no text and have no logits. Where that table has fewer rows,
    as of a module whose config was not told of a cut, no token beyond them can be read.

    Args:
        model: of transformers, or with as much of one as it has.
    """
    counts = (_stated(getattr(model, "config", None)), _rows(model))
    return min((count for count in counts if count is not None), default=None)


def _stated(config: Any) -> int | None:
    try:
        size = config.get_text_config().vocab_size
    except (AttributeError, ValueError):  # none, or several
        return None
    return size if isinstance(size, int) and size > 0 else None


def _rows(model: Any) -> int | None:
    """Of the table in which tokens are looked up; vision models give the layer that cuts an image instead."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return int(table.weight.shape[0]) if isinstance(table, nn.Embedding) else None
