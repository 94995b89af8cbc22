"""Images and sounds among a language model's tokens: which token stands for them, and how many times.

The one thing to know: the model itself counts. Its own method that makes the features of an image is run on
the meta device, where it costs nothing, and each feature needs one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.graph.input_shapes import SHAPES, Asked, Shape


@dataclass(frozen=True)
class Media:
    """A kind of input whose features take the place of tokens.

    Attributes:
        values: forward's parameter that takes it.
        features: the model's method that makes its features.
        token: what configs call the token that stands for a feature.
        start, end: what configs call the tokens around them.
        besides: further inputs that say how large it is, to be tried in turn.
    """

    values: str
    features: str
    token: tuple[str, ...]
    start: tuple[str, ...]
    end: tuple[str, ...]
    besides: tuple[tuple[str, ...], ...] = ((),)


MEDIA = (
    Media(
        "pixel_values",
        "get_image_features",
        ("image_token_id", "image_token_index"),
        ("vision_start_token_id", "boi_token_index", "boi_token_id"),
        ("vision_end_token_id", "eoi_token_index", "eoi_token_id"),
        (("image_grid_thw",), (), ("image_sizes",)),
    ),
    Media(
        "input_features",
        "get_audio_features",
        ("audio_token_id", "audio_token_index"),
        ("audio_start_token_id", "boa_token_id"),
        ("audio_end_token_id", "eoa_token_id"),
    ),
)
TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that are 1 where a token stands for an image, of models that take images among their tokens."""
STOPPED = object()
"""Of a run without data that came to where a model asks for a value."""


def media_of(asked: Asked) -> list[Media]:
    """The kinds that the model takes among its tokens."""
    return [
        media
        for media in MEDIA
        if {media.values, "input_ids"} <= asked.accepted and _token(asked, media.token) is not None
    ]


def towers(asked: Asked) -> set[str]:
    """Inputs whose features the model makes beside those of text, not among its tokens: CLIP's and CLAP's."""
    config = asked.model.config
    return {
        media.values
        for media in MEDIA
        if callable(getattr(asked.model, media.features, None))
        and all(getattr(config, name, None) is None for name in media.token)
    } & asked.accepted


def special_ids(asked: Asked) -> list[int]:
    """Tokens that stand for something else than text, which no text drawn at random may hold."""
    config = asked.model.config
    named = [name for media in MEDIA for name in (*media.token, *media.start, *media.end)]
    named += ["video_token_id", "video_token_index"]
    values = [getattr(config, name, None) for name in named]
    return sorted({value for value in values if isinstance(value, int)})


def stand_ins(asked: Asked) -> list[int]:
    """Tokens that stand for a feature of an image or a sound."""
    found = (_token(asked, media.token) for media in MEDIA)
    return [value for value in found if value is not None]


def with_tokens(asked: Asked, media: Media) -> tuple[dict[str, Shape], list[int]] | None:
    """Inputs of one kind, and the tokens that one image or sound takes; None if the model does not say."""
    token = _token(asked, media.token)
    around = (_token(asked, media.start), _token(asked, media.end))
    start, end = ([] if each is None else [each] for each in around)
    for shapes in _inputs_of(asked, media):
        count = _counted(asked, media, shapes) or _stated(asked, shapes, shapes[media.values])
        if count is not None and token is not None:
            return shapes, [*start, *[token] * count, *end]
    return None


def _inputs_of(asked: Asked, media: Media) -> Iterator[dict[str, Shape]]:
    """What to try: values of every shape, with and without what says how large they were."""
    for values in SHAPES[media.values](asked):
        for besides in media.besides:
            if set(besides) <= asked.accepted:
                yield {media.values: values, **{name: next(SHAPES[name](asked)) for name in besides}}


def _token(asked: Asked, names: tuple[str, ...]) -> int | None:
    vocabulary = asked.vocabulary
    found = (getattr(asked.model.config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and 0 <= value < vocabulary), None)


def _counted(asked: Asked, media: Media, shapes: Mapping[str, Shape]) -> int | None:
    """Features of one image or sound, as many as the model makes of it."""
    encoder: Any = asked.model.get_encoder() if hasattr(asked.model, "get_encoder") else None
    both: tuple[Any, Any] = (asked.model, encoder)
    owners = (owner for owner in both if callable(getattr(owner, media.features, None)))
    found = (run_on_meta(_Method(owner, media.features), shapes) for owner in owners)
    features = next((each for each in found if each is not None), None)
    rows = _rows(getattr(features, "pooler_output", features))
    return rows // asked.batch if rows and rows % asked.batch == 0 else None


def _stated(asked: Asked, shapes: Mapping[str, Shape], values: Shape) -> int | None:
    """Features of one image by the config, of models whose own count depends on the image's data.

    Those have a number of queries for it, or merge squares of patches, and take patches and a grid, an image
    and its size, or several images a text.
    """
    queries = asked.get("num_query_tokens")
    if queries is not None:
        return int(queries)
    is_sized = len(values.sizes) == 2 or "image_sizes" in shapes
    side = asked.get("spatial_merge_size" if is_sized else "scale_factor")
    patch = asked.get("patch_size")
    if side is None or not isinstance(patch, int) or not (is_sized or len(values.sizes) == 5):
        return None
    if len(values.sizes) == 2:
        return int(values.sizes[0] // asked.batch // side**2)
    *_, height, width = values.sizes
    return int(height // patch * (width // patch) // side**2)


def _rows(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1] if features.dim() > 1 else 0
    return sum(_rows(each) for each in features) if isinstance(features, list | tuple) else 0


class _Method(nn.Module):
    """A method of a module as a module's forward."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, **inputs: Any) -> Any:
        """What the method returns."""
        return getattr(self.owner, self.name)(**inputs)


def run_on_meta(module: nn.Module, shapes: Mapping[str, Shape]) -> Any:
    """What a module returns for inputs of these shapes, computed without data; None if it cannot run.

    `STOPPED` if it runs up to where it asks for the value of a tensor.

    Args:
        module: on any device; neither it nor the random state is changed.
        shapes: by keyword; sizes, which are rows of values, keep them.
    """
    stored = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in stored.items()
    }
    dtype = next((t.dtype for t in stored.values() if t.is_floating_point()), torch.float32)
    inputs = {name: _meta(shape, dtype) for name, shape in shapes.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return torch.func.functional_call(module, empty, (), inputs)
        except Exception as error:  # noqa: BLE001  # whatever else it raises: not with these inputs
            return STOPPED if _lacks_values(error) else None


def _lacks_values(error: Exception) -> bool:
    """Whether torch says that a meta tensor has no data, or does not go with one that has."""
    said = str(error).lower()
    is_of_meta = re.search(r"\bmeta\b", said) is not None
    return isinstance(error, RuntimeError) and (is_of_meta or "data-independent" in said)


def _meta(shape: Shape, dtype: torch.dtype) -> Tensor:
    if isinstance(shape.fill, tuple) and not shape.dtype.is_floating_point:
        return torch.tensor(shape.fill, dtype=shape.dtype).expand(shape.sizes).clone()
    return torch.empty(
        shape.sizes, dtype=dtype if shape.dtype.is_floating_point else shape.dtype, device="meta"
    )
