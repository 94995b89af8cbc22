"""A model's default config made tiny: widths, layers, heads, vocabularies, experts and images by their names.

The one thing to know: hidden sizes stay equal all over the tree of configs (a projector fits both models that
it joins), other widths keep their ratio to the hidden size, and of the layers one of each kind stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = 64
HEADS = 4
HEAD = HIDDEN // HEADS
VOCABULARY = 512
POSITIONS = 64
IMAGE = 64
PATCH = 8
LAYERS = 2
MOST_LAYERS = 6

WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "hidden_dim",
    "dim",
    "model_dim",
    "emb_dim",
    "width",
)
_DEPTH = re.compile(
    r"(^|_)(layers?|depth|blocks)$|^(n|num)_layers?|^num_hidden_layers|_num_layers$|layers_per_block$"
)
_HEADS = re.compile(r"(^|_)(n_|num_)?(attention_|attn_)?heads?$")
_HEAD_SIZE = re.compile(r"head_(dim|size)$|kv_channels$|^d_kv$|d_head$|attention_head_size$|head_dim_")
_VOCABULARY = re.compile(r"vocab|codebook_size|num_embeddings|num_tokens$|^n_tokens|card$")
_TOKEN = re.compile(r"token_(id|ids|index)$|_token_idx$|^(pad|bos|eos|sep|cls|mask)_index$")
_POSITIONS = re.compile(
    r"max_(position|source|target|seq|2d_position|text|length|len)|max_sequence|n_positions|n_ctx$|max_relative"
    r"|max_window_layers|max_\w*_(length|positions|len)$|context_length_max"
)
_IMAGE = re.compile(r"^(image|img|input|crop|pretrain_image|pretrained_image)_size$")
_EXPERTS = re.compile(r"num_\w*experts$|^n_routed_experts$|^num_experts|num_local_experts|^n_experts")
_PER_TOKEN = re.compile(r"experts?_per_tok|top_?k$|num_selected|num_experts_per")
_PERIOD = re.compile(r"(period|interval|_freq|_every|_step)s?$|sparse_step$")
_INDICES = re.compile(r"(indices|indexes|feature_layers?|_index_list|_layer_ids|layer_idx|mlp_only_layers)$")
_WIDTH = re.compile(
    r"(size|dim|width|channels?|d_ff|ffn|inner|filters|features?|units|planes|d_model|n_embd)(_\w+)?$|^d_\w+$"
)
_KEPT = re.compile(
    r"kernel|patch|stride|window|chunk|shift|pool|num_channels|in_channels|in_chans|padding|dilat|num_labels|tubelet"
    r"|temporal|merge|group|num_feature|mel_bins|sampling|rate|pyramid|text_len|^num_channels|feature_type|prediction"
    r"|spatial|downsampl|upsampl|num_parallel|input_size|scale|factor|ratio|num_time|static|dynamic|bins?$|n_fft|hop"
)
_SMALL = {  # the most that a field may be, where neither width nor count of the above
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "chunk_size": 16,
    "attention_window": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_frames": 4,
    "num_queries": 10,
    "num_object_queries": 10,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_nextn_predict_layers": 0,
    "num_query_tokens": 4,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_ngroups": 1,
    "rotary_dim": 8,
    "index_topk": 16,
    "num_buckets": 8,
    "num_denoising": 4,
}
_OPEN = {  # what a default config leaves open though the model needs it
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "prediction_length": 8,
}
_DERIVED = {"per_layer_config", "stage_names"}


@dataclass(frozen=True)
class _Tree:
    """What holds in the whole tree of configs: its hidden sizes, and the new number of each large token."""

    hidden: frozenset[int]
    tokens: dict[int, int]


def shrink(config: Mapping[str, Any], special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tiny config of the same kind.

    Args:
        config: as ``to_dict`` gives it.
        special: fields to set in the end, by their path (``text_config.num_hidden_layers``).
    """
    tree = _Tree(frozenset(_hidden_sizes(config)), {})
    small = _shrink(config, tree, _hidden_of(config))
    for path, value in (special or {}).items():
        *parents, leaf = path.split(".")
        place = small
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return small


def _is_config(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and ("model_type" in value or key.endswith("_config"))


def _hidden_of(config: Mapping[str, Any]) -> int | None:
    # Models in stages double what they begin with.
    names = ("embed_dim", *WIDTHS) if "depths" in config else WIDTHS
    return next((config[key] for key in names if type(config.get(key)) is int), None)


def _hidden_sizes(config: Mapping[str, Any]) -> set[int]:
    own = _hidden_of(config)
    found = set() if own is None else {own}
    for key, value in config.items():
        if _is_config(key, value):
            found |= _hidden_sizes(value)
    return found


def _shrink(config: Mapping[str, Any], tree: _Tree, above: int | None) -> dict[str, Any]:
    hidden = _hidden_of(config) or above
    depth = _depth_of(config)
    kept = _kept_layers(config, depth)
    small = {}
    for key, value in config.items():
        if key in _DERIVED:
            continue
        if key in ("out_features", "_out_features", "out_indices", "_out_indices"):
            small[key] = _outputs(key, value, config)
        elif value is None:
            small[key] = _OPEN.get(key)
        elif _is_config(key, value):
            small[key] = _shrink(value, tree, hidden)
        elif isinstance(value, Mapping):
            small[key] = _dictionary(value)
        elif isinstance(value, (list, tuple)):
            small[key] = _list(key, list(value), config, tree, hidden, depth, kept)
        elif type(value) is int:
            small[key] = _int(key, value, config, tree, hidden, kept)
        else:
            small[key] = value
    return small


def _depth_of(config: Mapping[str, Any]) -> int:
    depths = (config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers"))
    depth = next((value for value in depths if type(value) is int), 0)
    return 0 if "depths" in config else depth


def _outputs(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    """The stages that a backbone gives: the last ones, as many as before."""
    names = config.get("out_features") or config.get("_out_features") or ()
    if "depths" in config or not _depth_of(config):
        return value
    if len(names) < 2 or "indices" in key:
        return None
    return [f"stage{i + 1}" for i in range(len(names))]


def _kept_layers(config: Mapping[str, Any], depth: int) -> list[int]:
    """Indices of the layers that stay: the first of each kind, and at least two."""
    lists = [value for value in config.values() if isinstance(value, (list, tuple)) and len(value) == depth]
    kinds: dict[str, int] = {}
    for i in range(depth if lists else 0):
        kinds.setdefault(repr([value[i] for value in lists]), i)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    outputs = config.get("out_features") or config.get("_out_features") or ()
    for i in range(depth):
        if len(kept) >= min(max(LAYERS, len(outputs)), depth):
            break
        if i not in kept:
            kept.append(i)
    return sorted(kept)


def _int(
    key: str, value: int, config: Mapping[str, Any], tree: _Tree, hidden: int | None, kept: list[int]
) -> int:
    if key in _SMALL:
        return min(value, _SMALL[key])
    if _TOKEN.search(key):
        return _token(value, tree)
    if key in ("num_hidden_layers", "n_layer", "num_layers"):
        return len(kept) if kept else value
    if key.endswith("feat_extract_layers"):
        return value
    if _PERIOD.search(key):
        return min(value, 2)
    if key.endswith("_offset") or key.startswith("first_k"):
        return min(value, 1)
    if _PER_TOKEN.search(key):
        return min(value, 2)
    if _EXPERTS.search(key):
        return min(value, 4)
    if key.endswith("rank"):
        return min(value, 32)
    if _HEAD_SIZE.search(key):
        return min(value, HEAD)
    if "head" in key and _HEADS.search(key):
        return _heads(key, value, config, hidden)
    if _DEPTH.search(key):
        return min(value, LAYERS)
    if _VOCABULARY.search(key):
        return min(value, VOCABULARY)
    if _POSITIONS.search(key):
        return min(value, POSITIONS)
    if _IMAGE.search(key):
        return _image(value, config)
    if key == "patch_size":
        return min(value, PATCH)
    if key == "window_size" and "depths" in config:
        return min(value, 2)  # what is left of an image in the last stage
    if _KEPT.search(key) and value <= 1024 and value not in tree.hidden:
        return value
    if key == "embed_dim" and "depths" in config:
        return min(value, HIDDEN // 2)
    if key in WIDTHS or value in tree.hidden:
        return min(HIDDEN, value)
    return _width(value, hidden) if _WIDTH.search(key) else value


def _token(value: int, tree: _Tree) -> int:
    if value < VOCABULARY // 2:
        return value
    return tree.tokens.setdefault(value, VOCABULARY - 1 - len(tree.tokens))


def _heads(key: str, value: int, config: Mapping[str, Any], hidden: int | None) -> int:
    head = config.get("mamba_head_dim") or config.get("mamba_d_head") or config.get("head_dim")
    inner = config.get("expand") or config.get("mamba_expand")
    is_state_space = "mamba" in key or ("expand" in config and "state_size" in config)
    if is_state_space and inner and hidden and type(head) is int and value * head == inner * hidden:
        return int(inner * HIDDEN) // min(head, HEAD)
    if "kv" in key or "key" in key or "group" in key:
        same = any(other == value for name, other in config.items() if name != key and _HEADS.search(name))
        return value if value <= 2 else HEADS if same and "value" in key else HEADS // 2
    return min(value, HEADS)


def _image(value: int, config: Mapping[str, Any]) -> int:
    patch = config.get("patch_size")
    return min(value, 4 * PATCH if type(patch) is int and patch >= PATCH else IMAGE)


def _width(value: int, hidden: int | None) -> int:
    """In its ratio to the hidden size, a multiple of 8."""
    if value <= 16:
        return value
    ratio = value / hidden if hidden else 1.0
    return min(value, max(16, min(4 * HIDDEN, 8 * round(ratio * HIDDEN / 8))))


def _list(
    key: str,
    value: list[Any],
    config: Mapping[str, Any],
    tree: _Tree,
    hidden: int | None,
    depth: int,
    kept: list[int],
) -> list[Any]:
    if _TOKEN.search(key):
        return [_token(item, tree) if type(item) is int else item for item in value]
    if _IMAGE.search(key):
        return [_image(item, config) if type(item) is int else item for item in value]
    if depth and len(value) == depth and len(value) > 1:
        inner = [value[i] for i in kept]
        return [_int(key, item, config, tree, hidden, kept) if type(item) is int else item for item in inner]
    if not value or not all(type(item) is int for item in value):
        return value
    if _INDICES.search(key):
        last = len(kept) - 1 if kept else 0
        return sorted({min(item, last) for item in value}) if depth else value
    if "depths" in key or key in ("layers", "num_blocks", "num_layers") or _DEPTH.search(key):
        return [min(item, 1) for item in value]
    if "head" in key and value[0]:
        return [max(1, item * min(value[0], 2) // value[0]) for item in value]
    if _KEPT.search(key):
        return value
    if _WIDTH.search(key.removesuffix("s")) and min(value) >= 16:
        return [max(8, 8 * round(item * 16 / min(value) / 8)) for item in value]
    return value


def _dictionary(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: sections and factors are of half a head."""
    small: dict[str, Any] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            return dict(value)
        if isinstance(item, Mapping):
            small[name] = _dictionary(item)
        elif name.endswith("section") and isinstance(item, (list, tuple)) and sum(item):
            parts = [max(1, part * (HEAD // 2) // sum(item)) for part in item]
            small[name] = [*parts[:-1], HEAD // 2 - sum(parts[:-1])]
        elif name in ("long_factor", "short_factor") and isinstance(item, (list, tuple)):
            small[name] = list(item)[: HEAD // 2]
        else:
            small[name] = item
    return small
