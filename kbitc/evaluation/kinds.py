"""What a model can be scored by: asked of the model and of transformers' own tables of classes.

The one thing to know: a model that fits nothing here is refused. Its classes, sounds or boxes would give a
number too, and it would mean nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import KbitcError, UsageError, first_line
from kbitc.evaluation.causality import why_not_causal

PROBE = 8  # tokens


class Kind(StrEnum):
    """What a model is scored as."""

    CAUSAL = "causal language model"
    MASKED = "masked language model"
    ENCODER_DECODER = "encoder-decoder"
    EMBEDDING = "embedding model"
    IMAGE_TEXT = "image-text model"


SCORED = (
    "causal language models (perplexity, and accuracy on --tasks), masked ones (loss at masked tokens), "
    "encoder-decoders of text (loss on --pairs), embedding models and those of images and text (cosine and "
    "retrieval against the source)"
)


@torch.inference_mode()
def kind_of(model: nn.Module, label: str) -> Kind:
    """What a model is scored as.

    Args:
        model: in eval mode.
        label: as the user named it.

    Raises:
        UsageError: nothing that eval measures means anything of it, or it is exported and decodes nothing.
    """
    kind, reason = _kind_or_reason(model)
    if kind is None:
        raise UsageError(
            f"{label}: nothing that eval measures says anything of a {type(model).__name__}, which {reason}. "
            f"It scores {SCORED}; load this one with kbitc.load and measure it on its own task"
        )
    return kind


def _kind_or_reason(model: Any) -> tuple[Kind | None, str]:
    from transformers.models.auto import modeling_auto as auto

    name, config = type(model).__name__, getattr(model, "config", None)
    if hasattr(model, "need_decoder"):  # an exported one says so itself
        model.need_decoder()
        return Kind.CAUSAL, ""
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return Kind.IMAGE_TEXT, ""
    if getattr(config, "is_encoder_decoder", False):
        reads = getattr(model, "main_input_name", "input_ids")
        if reads != "input_ids":
            return None, f"reads {reads}, not text"
        if name in _classes(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
            return Kind.ENCODER_DECODER, ""
        return None, "reads one text and gives no other"
    if name in _classes(auto.MODEL_MAPPING_NAMES) | _classes(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        why_not = _why_no_embeddings(model)
        return (None, why_not) if why_not else (Kind.EMBEDDING, "")
    reason = why_not_causal(model)
    if reason is None:
        return Kind.CAUSAL, ""
    if name in _classes(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) and "tokens after" in reason:
        return Kind.MASKED, ""
    return None, reason


def _classes(table: Any) -> set[str]:
    """Names of classes in one of transformers' tables, which has tuples for some types."""
    return {name for names in table.values() for name in ((names,) if isinstance(names, str) else names)}


def _why_no_embeddings(model: Any) -> str:
    """Why a base model gives no vector for each token of a text; empty where it does."""
    vocabulary = vocabulary_size(model)
    if not vocabulary:
        return "has no vocabulary"
    ids = (vocabulary // 2 + torch.arange(PROBE)) % vocabulary
    try:
        hidden = model(input_ids=ids[None]).last_hidden_state
    except KbitcError:
        raise
    except AttributeError:
        return "gives no hidden states"
    except Exception as error:  # noqa: BLE001  # whatever a model says that wants other inputs
        return f"cannot be given token ids alone ({first_line(error)})"
    is_each = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == (1, PROBE)
    return "" if is_each else "gives no vector for each token"
