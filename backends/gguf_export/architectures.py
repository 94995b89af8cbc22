"""Models of transformers as llama.cpp's architectures: what the header says, and how tensors are turned.

The one thing to know: a model whose computation llama.cpp would do otherwise is refused. What it fixes itself
(the scale of attention, the pattern of sliding windows, the local rotary base) is compared with the config.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kbitc.errors import SourceError, UsageError

_log = logging.getLogger(__name__)

Value: TypeAlias = str | int | float | bool
Header: TypeAlias = Iterator[tuple[str, Value]]

FULL, SLIDING = "full_attention", "sliding_attention"
LOCAL_BASE = 10_000.0  # llama.cpp's, of Gemma 3's sliding windows


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a family of models.

    Attributes:
        name: there.
        is_permuted: rows of queries and keys lie in pairs, as its rotary embedding takes them.
        adds_one: norms multiply by their weight and not by 1 + weight.
        period: every so manyth layer sees all tokens, the others a window of them; 0 where all see all.
        activation: of the feed-forward layers.
    """

    name: str
    is_permuted: bool = False
    adds_one: bool = False
    period: int = 0
    activation: str = "silu"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", is_permuted=True),
    "mistral": Architecture("llama", is_permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", adds_one=True, activation="gelu_pytorch_tanh"),
    "gemma2": Architecture("gemma2", adds_one=True, activation="gelu_pytorch_tanh", period=2),
    "gemma3_text": Architecture("gemma3", adds_one=True, activation="gelu_pytorch_tanh", period=6),
}
"""By ``model_type``."""


def architecture_of(config: Any, label: str) -> Architecture:
    """Of a model's config.

    Raises:
        UsageError: it is not written.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UsageError(
            f"{label}: models of type '{config.model_type}' are not written as GGUF; these are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return found


def header_of(config: Any, architecture: Architecture, label: str) -> Header:
    """Keys and values below the architecture's name.

    Raises:
        UsageError: llama.cpp would compute something else.
    """
    heads, width = config.num_attention_heads, _head_width(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        raise _differs(label, f"activation {activation}")
    yield "block_count", int(config.num_hidden_layers)
    yield "context_length", int(config.max_position_embeddings)
    yield "embedding_length", int(config.hidden_size)
    yield "feed_forward_length", int(config.intermediate_size)
    yield "attention.head_count", int(heads)
    yield "attention.head_count_kv", int(config.num_key_value_heads)
    yield "attention.key_length", width
    yield "attention.value_length", width
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield "rope.dimension_count", width
    yield "vocab_size", int(config.vocab_size)
    yield from _rotation(config, label)
    yield from _windows(config, architecture, label)


def _differs(label: str, what: str) -> UsageError:
    return UsageError(
        f"{label}: llama.cpp has no {what} in this architecture, so it cannot be written as GGUF"
    )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation_of(config: Any) -> Mapping[str, Any]:
    """Parameters of the rotary embedding, of the layers that see everything."""
    known: Mapping[str, Any] = config.rope_parameters or {}
    found: Mapping[str, Any] = known.get(FULL, known)
    return found


def _rotation(config: Any, label: str) -> Header:
    known = rotation_of(config)
    yield "rope.freq_base", float(known.get("rope_theta", LOCAL_BASE))
    kind = known.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(known["factor"])
    if kind == "yarn":
        original = known.get("original_max_position_embeddings") or config.max_position_embeddings
        yield "rope.scaling.original_context_length", int(original)
    if kind not in ("default", "linear", "yarn", "llama3") or known.get("partial_rotary_factor", 1.0) != 1.0:
        raise _differs(label, f"rotary embedding of type {kind}")


def _windows(config: Any, architecture: Architecture, label: str) -> Header:
    layers = list(getattr(config, "layer_types", None) or [])
    window = int(getattr(config, "sliding_window", None) or 0)
    period = architecture.period
    if not period:
        if 0 < window < config.max_position_embeddings and (SLIDING in layers or not layers):
            _log.warning(
                "%s: llama.cpp attends to all tokens where this model sees %d; beyond them they differ",
                label,
                window,
            )
        return
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != _head_width(config):
        raise _differs(label, f"attention scaled by {scale} ** -0.5 with heads of {_head_width(config)}")
    if layers != [FULL if (i + 1) % period == 0 else SLIDING for i in range(len(layers))]:
        raise _differs(label, f"sliding windows but in all layers beside every {period}th")
    yield "attention.sliding_window", window
    if architecture.name == "gemma2":
        yield "attn_logit_softcapping", float(config.attn_logit_softcapping or 0.0)
        yield "final_logit_softcapping", float(config.final_logit_softcapping or 0.0)
        return
    local = (config.rope_parameters or {}).get(SLIDING, {})
    if local.get("rope_theta", LOCAL_BASE) != LOCAL_BASE or local.get("rope_type", "default") != "default":
        raise _differs(label, f"local rotary base but {LOCAL_BASE:g}")


def frequencies_of(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies, ``(width / 2,)`` float32, where they are scaled as Llama 3's."""
    known = rotation_of(config)
    if known.get("rope_type", "default") != "llama3":
        return None
    width = _head_width(config)
    lengths = 2 * math.pi * known["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    factor, low, high = known["factor"], known["low_freq_factor"], known["high_freq_factor"]
    context = known["original_max_position_embeddings"]
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    long, short = lengths > context / low, lengths < context / high
    divisors = torch.where(long, float(factor), torch.where(short, 1.0, between))
    return divisors.float()


def names_of(
    parameters: Iterable[str], config: Any, architecture: Architecture, label: str
) -> dict[str, str]:
    """The name there of each parameter.

    Raises:
        SourceError: one has none.
    """
    import gguf

    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for name in parameters:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SourceError(f"{label}: llama.cpp's {architecture.name} has no tensor for '{name}'")
        names[name] = found
    return names


def order_of(name: str, rows: int, config: Any, architecture: Architecture) -> Tensor | None:
    """The order of rows there, ``(rows,)`` int64; None where it is the same."""
    module = name.split(".")[-2]
    if not architecture.is_permuted or module not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, -1).mT.flatten()


def vector_of(name: str, values: Tensor, architecture: Architecture) -> Tensor:
    """A vector in float32 as it stands there."""
    is_norm = name.endswith("norm.weight")
    return values.float() + 1.0 if architecture.adds_one and is_norm else values.float()
