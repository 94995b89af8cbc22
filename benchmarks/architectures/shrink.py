"""A model's default config made tiny: widths, layers, heads, vocabularies, experts and images by their names.

The one thing to know: hidden sizes stay equal all over the tree of configs (a projector fits both models that
it joins), other widths keep their ratio to the hidden size, those of stages one ratio all over the tree, and
of the layers one of each kind stays. What a config's class does not declare, it derives: that is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
_PER_TOKEN = re.compile(r"experts?_per_tok|top_?k$|moe_k$|num_selected|num_experts_per")
_PERIOD = re.compile(r"(period|interval|_freq|_every|_step)s?$|sparse_step$")
_INDICES = re.compile(r"(indices|indexes|feature_layers?|_index_list|_layer_ids|layer_idx|mlp_only_layers)$")
_WIDTH = re.compile(
    r"(size|dim|width|channels?|d_ff|ffn|inner|filters|features?|units|planes|d_model|n_embd|d_ssm)(_\w+)?$|^d_\w+$"
)
_KEPT = re.compile(
    r"kernel|patch|stride|window|chunk|shift|pool|num_channels|in_channels|in_chans|padding|dilat|num_labels|tubelet"
    r"|temporal|merge|group|num_feature|mel_bins|sampling|rate|pyramid|text_len|^spec_size|^num_channels|feature_type|prediction"
    r"|spatial|downsampl|upsampl|num_parallel|input_size|scale|factor|ratio|num_time|static|dynamic|bins?$|n_fft|hop"
)
_CHANNELS = re.compile(r"(in|out|mid)_(channels|features)$")
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
    "num_windows": 4,
    "num_filters": 8,
    "mm_tokens_per_image": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
}
_OPEN = {  # what a default config leaves open though the model needs it
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "prediction_length": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 2 * HIDDEN,
    "attn_layer_indices": [1],
    "image_token_id": VOCABULARY - 101,
    "image_token_index": VOCABULARY - 101,
    "audio_token_id": VOCABULARY - 102,
    "audio_token_index": VOCABULARY - 102,
    "video_token_id": VOCABULARY - 103,
    "video_token_index": VOCABULARY - 103,
}
_OUTPUTS = ("out_features", "_out_features", "out_indices", "_out_indices")
_DERIVED = {"per_layer_config", "stage_names"}


@dataclass(frozen=True)
class _Tree:
    """What holds in the whole tree of configs.

    Attributes:
        hidden: its hidden sizes.
        tokens: the new number of each large token.
        ratio: new widths to old ones, of stages: what one stage gives the next one takes.
    """

    hidden: frozenset[int]
    tokens: dict[int, int]
    ratio: float


def shrink(config: Mapping[str, Any], special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tiny config of the same kind.

    Args:
        config: as ``to_dict`` gives it.
        special: fields to set in the end, by their path (``text_config.num_hidden_layers``).
    """
    hidden, stages = frozenset(_hidden_sizes(config)), _stage_widths(config)
    shared = hidden & stages
    ratio = HIDDEN / max(shared) if shared else 16 / min(stages, default=16)
    tree = _Tree(hidden, {}, ratio)
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


def _stage_widths(config: Mapping[str, Any]) -> set[int]:
    """Widths in lists, one a stage."""
    found: set[int] = set()
    for key, value in config.items():
        if _is_config(key, value):
            found |= _stage_widths(value)
        elif _has_blocks(config):
            continue
        elif isinstance(value, (list, tuple)) and _is_stages(key, list(value)):
            found |= {item for item in value if item >= 16}
    return found


def _has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a config lists the numbers of every block of every stage; they all stay."""
    return any(
        isinstance(block, (list, tuple))
        for value in config.values()
        if isinstance(value, (list, tuple))
        for stage in value
        if isinstance(stage, (list, tuple))
        for block in stage
    )


def _is_stages(key: str, value: list[Any]) -> bool:
    """Whether a list has the widths of stages; what stands at the begin may be colors."""
    return (
        bool(value)
        and all(type(item) is int for item in value)
        and min(value[1:] or value) >= 16
        and bool(_WIDTH.search(key.removesuffix("s")))
        and not (_TOKEN.search(key) or _IMAGE.search(key) or _INDICES.search(key))
        and not (_KEPT.search(key) and not _CHANNELS.search(key))
    )


def _stage(value: int, tree: _Tree) -> int:
    return value if value < 16 else min(value, max(8, 8 * round(value * tree.ratio / 8)))


def _shrink(config: Mapping[str, Any], tree: _Tree, above: int | None) -> dict[str, Any]:
    hidden = _hidden_of(config) or above
    depth = _depth_of(config)
    kept = _kept_layers(config, depth)
    declared = getattr(_class_of(config), "__dataclass_fields__", {})  # its class makes the rest of them
    small: dict[str, Any] = {}
    for key, value in config.items():
        is_derived = bool(declared) and key not in declared and key not in _OUTPUTS
        if key in _DERIVED or (
            is_derived and isinstance(value, (int, list, tuple)) and type(value) is not bool
        ):
            continue
        if key in _OUTPUTS and not _is_stages(key, list(value or [])):
            small[key] = _outputs(key, value, config)
        elif value is None:
            small[key] = _open(key, config, kept)
        elif _is_config(key, value):
            small[key] = _shrink(value, tree, hidden)
        elif isinstance(value, Mapping):
            small[key] = _dictionary(value)
            if value and key == "rope_parameters" and "mrope_section" in _rotary_keys(config):
                small[key].setdefault("mrope_section", _sections(value))
        elif isinstance(value, (list, tuple)):
            small[key] = _list(key, list(value), config, tree, hidden, depth, kept)
        elif type(value) is int:
            small[key] = _int(key, value, config, tree, hidden, kept)
        else:
            small[key] = value
    return small


def _open(key: str, config: Mapping[str, Any], kept: list[int]) -> Any:
    """What to set where a default config has nothing."""
    if key == "sliding_window":
        return _SMALL[key] if "sliding_attention" in (config.get("layer_types") or ()) else None
    if key == "mlp_layer_types":
        return ["dense", *["sparse"] * (len(kept) - 1)]
    return _OPEN.get(key)


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
    patterns = [value for key, value in config.items() if key.endswith(("_types", "_pattern")) and value]
    pattern = max((len(value) for value in patterns if isinstance(value, (list, tuple))), default=0)
    least = max(LAYERS, len(outputs), pattern if pattern < min(depth, MOST_LAYERS) else 0)
    for i in range(depth):
        if len(kept) >= min(least, depth):
            break
        if i not in kept:
            kept.append(i)
    return sorted(kept)


def _int(
    key: str, value: int, config: Mapping[str, Any], tree: _Tree, hidden: int | None, kept: list[int]
) -> int:
    if key in _SMALL:
        return min(value, _SMALL[key])
    doubled = 1 << (len(config.get("depths") or [0]) - 1)
    if key.endswith("hidden_size") and value < value * doubled == config.get("hidden_size"):
        return HIDDEN // doubled
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
        return value if value == len(config.get("depths") or ()) else min(value, LAYERS)
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
    if key == "out_hidden_size" and value // 4 in tree.hidden:  # four patches merged into one
        return 4 * HIDDEN
    if key in WIDTHS or key == "out_hidden_size" or value in tree.hidden:
        return min(HIDDEN, value)
    return _width(value, hidden) if _WIDTH.search(key) else value


def _token(value: int, tree: _Tree) -> int:
    if value < VOCABULARY // 2:
        return value
    return tree.tokens.setdefault(value, VOCABULARY - 1 - len(tree.tokens))


def _heads(key: str, value: int, config: Mapping[str, Any], hidden: int | None) -> int:
    head = config.get("mamba_head_dim") or config.get("mamba_d_head") or config.get("head_dim")
    inner = config.get("expand") or config.get("mamba_expand")
    if (inner_size := config.get("mamba_d_ssm")) and "mamba" in key and type(head) is int:
        return _width(inner_size, hidden) // min(head, HEAD)
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
    if key.endswith("pinpoints"):
        least = min(side for item in value for side in item)
        return [[side * 4 * PATCH // least for side in item] for item in value]
    if value and all(isinstance(item, (list, tuple)) for item in value):
        return [[_stage(i, tree) for i in item] if _is_stages(key, list(item)) else item for item in value]
    if _is_stages(key, value) and not _has_blocks(config):
        return [_stage(item, tree) for item in value]
    if not value or not all(type(item) is int for item in value):
        return value
    if key.endswith("hook_ids"):  # of the layers of another config
        return [min(item, LAYERS - 1) for item in value]
    if _INDICES.search(key):
        last = len(kept) - 1 if kept else 0
        return sorted({min(item, last) for item in value}) if depth else value
    if "depths" in key or key in ("layers", "num_blocks", "num_layers") or _DEPTH.search(key):
        return [min(item, 1) for item in value]
    if "head" in key and value[0]:
        return [max(1, item * min(value[0], 2) // value[0]) for item in value]
    if _KEPT.search(key):
        return value
    return value


def _class_of(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name: Any = config.get("model_type")
    return CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401  # its get does not load


def _rotary_keys(config: Mapping[str, Any]) -> Collection[str]:
    """Rotary settings that a config's class knows besides transformers' own."""
    keys: Collection[str] = getattr(_class_of(config), "ignore_keys_at_rope_validation", None) or ()
    return keys


def _sections(rotary: Mapping[str, Any]) -> list[int]:
    """Of three axes, two alike: together half of what is rotated of a head."""
    half = int(HEAD * (rotary.get("partial_rotary_factor") or 1)) // 2
    third = 3 * half // 8
    return [third, third, half - 2 * third]


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
