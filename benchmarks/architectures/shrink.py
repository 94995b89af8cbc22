"""A model's default config made tiny, with the whole tree of configs in it; `fields` has the rules of fields.

The one thing to know: hidden sizes stay equal all over the tree of configs (a projector fits both models that
it joins), other widths keep their ratio to the hidden size, those of stages one ratio all over the tree, and
of the layers one of each kind stays. What a config's class does not declare, it derives: that is left to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from benchmarks.architectures.fields import (
    HEAD,
    HEADS,
    HIDDEN,
    LAYERS,
    SMALL,
    VOCABULARY,
    WIDTHS,
    Field,
    Place,
    Tree,
    has_blocks,
    is_stages,
    listed,
    number,
)

MOST_LAYERS = 6

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


def shrink(config: Mapping[str, Any], special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tiny config of the same kind.

    Args:
        config: as ``to_dict`` gives it.
        special: fields to set in the end, by their path (``text_config.num_hidden_layers``).
    """
    hidden, stages = frozenset(_hidden_sizes(config)), _stage_widths(config)
    shared = hidden & stages
    ratio = HIDDEN / max(shared) if shared else 16 / min(stages, default=16)
    tree = Tree(hidden, {}, ratio)
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
        elif has_blocks(config):
            continue
        elif isinstance(value, (list, tuple)) and is_stages(key, list(value)):
            found |= {item for item in value if item >= 16}
    return found


def _shrink(config: Mapping[str, Any], tree: Tree, above: int | None) -> dict[str, Any]:
    hidden = _hidden_of(config) or above
    depth = _depth_of(config)
    kept = _kept_layers(config, depth)
    place = Place(config, tree, hidden, depth, kept)
    declared = getattr(_class_of(config), "__dataclass_fields__", {})  # its class makes the rest of them
    small: dict[str, Any] = {}
    for key, value in config.items():
        is_derived = bool(declared) and key not in declared and key not in _OUTPUTS
        if key in _DERIVED or (
            is_derived and isinstance(value, (int, list, tuple)) and type(value) is not bool
        ):
            continue
        if key in _OUTPUTS and not is_stages(key, list(value or [])):
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
            small[key] = listed(Field(key, list(value), place))
        elif type(value) is int:
            small[key] = number(Field(key, value, place))
        else:
            small[key] = value
    return small


def _open(key: str, config: Mapping[str, Any], kept: list[int]) -> Any:
    """What to set where a default config has nothing."""
    if key == "sliding_window":
        return SMALL[key] if "sliding_attention" in (config.get("layer_types") or ()) else None
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
