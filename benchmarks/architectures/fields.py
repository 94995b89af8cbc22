"""What one field of a config becomes in a tiny one: rules by its name, of which the first that fits holds.

The one thing to know: the order of `NUMBERS` and of `LISTS` decides. What ends in "experts_per_tok" is no
number of experts, and a "patch_size" is made smaller before patches stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HIDDEN = 64
HEADS = 4
HEAD = HIDDEN // HEADS
VOCABULARY = 512
POSITIONS = 64
IMAGE = 64
PATCH = 8
LAYERS = 2

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
_LAYERS = re.compile(r"^(num_hidden_layers|n_layer|num_layers)$")
_MERGED = re.compile(r"^out_hidden_size$")
SMALL = {  # the most that a field may be, where neither width nor count of the above
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


@dataclass(frozen=True)
class Tree:
    """What holds in the whole tree of configs.

    Attributes:
        hidden: its hidden sizes.
        tokens: the new number of each large token.
        ratio: new widths to old ones, of stages: what one stage gives the next one takes.
    """

    hidden: frozenset[int]
    tokens: dict[int, int]
    ratio: float


@dataclass(frozen=True)
class Place:
    """Where fields stand.

    Attributes:
        config: whose fields they are, as it was.
        tree: that the config is in.
        hidden: its hidden size, or that of the config above.
        depth: its layers; 0 where it does not say, or has stages.
        kept: indices of the layers that stay.
    """

    config: Mapping[str, Any]
    tree: Tree
    hidden: int | None
    depth: int
    kept: list[int]

    @property
    def has_stages(self) -> bool:
        """Whether the model has stages of several blocks each."""
        return "depths" in self.config

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.config.get("depths") or ())


class Field(NamedTuple):
    """A value, its name and its place."""

    key: str
    value: Any
    place: Place


class Rule(NamedTuple):
    """What fields become.

    Attributes:
        names: of the fields; searched for in them.
        make: the new value.
        where: what must hold besides.
    """

    names: re.Pattern[str]
    make: Callable[[Field], Any]
    where: Callable[[Field], bool] = lambda _: True


def number(field: Field) -> int:
    """What a whole number becomes."""
    value: int = _by_first(NUMBERS, field)
    return value


def listed(field: Field) -> list[Any]:
    """What a list becomes."""
    value: list[Any] = _by_first(LISTS, field)
    return value


def _by_first(rules: Sequence[Rule], field: Field) -> Any:
    """By the first rule that fits; without one it stays."""
    fitting = (rule for rule in rules if rule.names.search(field.key) and rule.where(field))
    rule = next(fitting, None)
    return field.value if rule is None else rule.make(field)


def is_stages(key: str, value: list[Any]) -> bool:
    """Whether a list has the widths of stages; what stands at the begin may be colors."""
    return (
        bool(value)
        and all(type(item) is int for item in value)
        and min(value[1:] or value) >= 16
        and bool(_WIDTH.search(key.removesuffix("s")))
        and not (_TOKEN.search(key) or _IMAGE.search(key) or _INDICES.search(key))
        and not (_KEPT.search(key) and not _CHANNELS.search(key))
    )


def has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a config lists the numbers of every block of every stage; they all stay."""
    return any(
        isinstance(block, (list, tuple))
        for value in config.values()
        if isinstance(value, (list, tuple))
        for stage in value
        if isinstance(stage, (list, tuple))
        for block in stage
    )


# What a number becomes.


def _same(field: Field) -> Any:
    return field.value


def _at_most(limit: int) -> Callable[[Field], int]:
    return lambda field: min(field.value, limit)


def _token(field: Field) -> int:
    value, tokens = field.value, field.place.tree.tokens
    return value if value < VOCABULARY // 2 else tokens.setdefault(value, VOCABULARY - 1 - len(tokens))


def _doubled(place: Place) -> int:
    """The width of the last stage, where each has twice that of the one before, to the first's."""
    return 1 << max(0, place.stages - 1)


def _is_first_width(field: Field) -> bool:
    """Whether it is the first stage's width where the hidden size is the last one's."""
    value, doubled = field.value, _doubled(field.place)
    return bool(value < value * doubled == field.place.config.get("hidden_size"))


def _depth(field: Field) -> int:
    return field.value if field.value == field.place.stages else min(field.value, LAYERS)


def _heads(field: Field) -> int:
    key, value, config, hidden = field.key, field.value, field.place.config, field.place.hidden
    head = config.get("mamba_head_dim") or config.get("mamba_d_head") or config.get("head_dim")
    inner = config.get("expand") or config.get("mamba_expand")
    if (inner_size := config.get("mamba_d_ssm")) and "mamba" in key and type(head) is int:
        return _width(field._replace(value=inner_size)) // min(head, HEAD)
    is_state_space = "mamba" in key or ("expand" in config and "state_size" in config)
    if is_state_space and inner and hidden and type(head) is int and value * head == inner * hidden:
        return int(inner * HIDDEN) // min(head, HEAD)
    if "kv" in key or "key" in key or "group" in key:
        same = any(other == value for name, other in config.items() if name != key and _HEADS.search(name))
        return value if value <= 2 else HEADS if same and "value" in key else HEADS // 2
    return min(value, HEADS)


def _image(field: Field) -> int:
    patch = field.place.config.get("patch_size")
    return min(field.value, 4 * PATCH if type(patch) is int and patch >= PATCH else IMAGE)


def _width(field: Field) -> int:
    """In its ratio to the hidden size, a multiple of 8."""
    value, hidden = field.value, field.place.hidden
    if value <= 16:
        return int(value)
    ratio = value / hidden if hidden else 1.0
    return min(value, max(16, min(4 * HIDDEN, 8 * round(ratio * HIDDEN / 8))))


def _stage(value: int, tree: Tree) -> int:
    return value if value < 16 else min(value, max(8, 8 * round(value * tree.ratio / 8)))


# What a list becomes.


def _each(make: Callable[[Field], int]) -> Callable[[Field], list[Any]]:
    """Every whole number by itself."""

    def call(field: Field) -> list[Any]:
        return [make(field._replace(value=item)) if type(item) is int else item for item in field.value]

    return call


def _is_of_layers(field: Field) -> bool:
    return 1 < len(field.value) == field.place.depth


def _of_layers(field: Field) -> list[Any]:
    return _each(number)(field._replace(value=[field.value[i] for i in field.place.kept]))


def _pinpoints(field: Field) -> list[list[int]]:
    least = min(side for item in field.value for side in item)
    return [[side * 4 * PATCH // least for side in item] for item in field.value]


def _is_of_lists(field: Field) -> bool:
    return bool(field.value) and all(isinstance(item, (list, tuple)) for item in field.value)


def _lists_of_stages(field: Field) -> list[Any]:
    key, tree = field.key, field.place.tree
    return [[_stage(i, tree) for i in item] if is_stages(key, list(item)) else item for item in field.value]


def _stages(field: Field) -> list[int]:
    return [_stage(item, field.place.tree) for item in field.value]


def _is_not_of_numbers(field: Field) -> bool:
    return not field.value or not all(type(item) is int for item in field.value)


def _indices(field: Field) -> list[int]:
    last = max(0, len(field.place.kept) - 1)
    return sorted({min(item, last) for item in field.value}) if field.place.depth else field.value


def _ratios(field: Field) -> list[int]:
    """The same to the first, which is at most 2."""
    first = field.value[0]
    return [max(1, item * min(first, 2) // first) for item in field.value]


_ANY = re.compile("")

NUMBERS = (
    *(Rule(re.compile(f"^{key}$"), _at_most(limit)) for key, limit in SMALL.items()),
    Rule(re.compile(r"hidden_size$"), lambda field: HIDDEN // _doubled(field.place), _is_first_width),
    Rule(_TOKEN, _token),
    Rule(_LAYERS, lambda field: len(field.place.kept) or field.value),
    Rule(re.compile(r"feat_extract_layers$"), _same),
    Rule(_PERIOD, _at_most(2)),
    Rule(re.compile(r"_offset$|^first_k"), _at_most(1)),
    Rule(_PER_TOKEN, _at_most(2)),
    Rule(_EXPERTS, _at_most(4)),
    Rule(re.compile(r"rank$"), _at_most(32)),
    Rule(_HEAD_SIZE, _at_most(HEAD)),
    Rule(_HEADS, _heads),
    Rule(_DEPTH, _depth),
    Rule(_VOCABULARY, _at_most(VOCABULARY)),
    Rule(_POSITIONS, _at_most(POSITIONS)),
    Rule(_IMAGE, _image),
    Rule(re.compile(r"^patch_size$"), _at_most(PATCH)),
    # What is left of an image in the last stage.
    Rule(re.compile(r"^window_size$"), _at_most(2), lambda field: field.place.has_stages),
    Rule(_KEPT, _same, lambda field: field.value <= 1024 and field.value not in field.place.tree.hidden),
    Rule(re.compile(r"^embed_dim$"), _at_most(HIDDEN // 2), lambda field: field.place.has_stages),
    # Four patches merged into one.
    Rule(_MERGED, lambda _: 4 * HIDDEN, lambda field: field.value // 4 in field.place.tree.hidden),
    Rule(_MERGED, _at_most(HIDDEN)),
    Rule(re.compile(f"^({'|'.join(WIDTHS)})$"), _at_most(HIDDEN)),
    Rule(_ANY, _at_most(HIDDEN), lambda field: field.value in field.place.tree.hidden),
    Rule(_WIDTH, _width),
)
"""Of whole numbers, first ones first; others stay."""

LISTS = (
    Rule(_TOKEN, _each(_token)),
    Rule(_IMAGE, _each(_image)),
    Rule(_ANY, _of_layers, _is_of_layers),
    Rule(re.compile(r"pinpoints$"), _pinpoints),
    Rule(_ANY, _lists_of_stages, _is_of_lists),
    Rule(
        _ANY,
        _stages,
        lambda field: is_stages(field.key, field.value) and not has_blocks(field.place.config),
    ),
    Rule(_ANY, _same, _is_not_of_numbers),
    Rule(re.compile(r"hook_ids$"), _each(_at_most(LAYERS - 1))),  # layers of another config
    Rule(_INDICES, _indices),
    Rule(re.compile(r"depths|^layers$|^num_blocks$|^num_layers$"), _each(_at_most(1))),
    Rule(_DEPTH, _each(_at_most(1))),
    Rule(re.compile(r"head"), _ratios, lambda field: field.value[0] != 0),
)
"""Of lists, first ones first; others stay."""
