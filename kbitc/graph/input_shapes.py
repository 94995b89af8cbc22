"""Shapes that an input of a transformers model may have, by the name that forward gives it.

The one thing to know: where names leave several shapes open (a spectrogram is time by channels or channels
by time), all of them are listed, and `kbitc.graph.example_inputs` asks the model which one it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.graph.positions import usable_positions

IMAGE_SIZE = 224  # of vision models that take any size, and so have none in their config
MODALITIES = ("vision_config", "audio_config", "encoder", "encoder_config")  # parts of a config
FRAMES = 64  # of sound, where the model takes any length: enough for all usual strides


@dataclass(frozen=True)
class Asked:
    """What inputs are made of.

    Attributes:
        model: of transformers.
        accepted: names of forward's parameters.
        required: those of them that have no default.
        batch: sequences, images, sounds or series.
        tokens: of a sequence, before the model's own limit.
    """

    model: Any
    accepted: frozenset[str]
    required: frozenset[str]
    batch: int
    tokens: int

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that the config, or the part of it for one modality, has."""
        config = self.model.config
        inner = getattr(config, "encoder", None)
        parts = [getattr(each, part, None) for each in (config, inner) for part in MODALITIES]
        others = [getattr(config, part, None) for part in getattr(config, "sub_configs", ())]
        for name in names:
            for part in (*parts, config, *others):
                value = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
                if value is not None:
                    return value
        return default

    @property
    def length(self) -> int:
        """Tokens, as many as the model takes."""
        return min(self.tokens, usable_positions(self.model) or self.tokens)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; 0 for a model without."""
        return vocabulary_size(self.model) or 0


@dataclass(frozen=True)
class Shape:
    """One input.

    Attributes:
        sizes: of its dimensions.
        dtype: float32 for what is noise, int64 for token ids and whatever has a value of its own.
        fill: its values; None for noise and token ids, which are drawn.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fill: Any = None


Shapes: TypeAlias = Callable[[Asked], Iterator[Shape]]


def _ids(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, asked.length), torch.int64)


def _attended(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, asked.length), torch.int64, 1)


def _decoder_ids(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, max(1, min(asked.tokens - 1, asked.length))), torch.int64)


def image_size(asked: Asked) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    size = asked.get("image_size", "img_size", "crop_size", "input_size", default=IMAGE_SIZE)
    if isinstance(size, Mapping):
        size = (size.get("height", IMAGE_SIZE), size.get("width", IMAGE_SIZE))
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return asked.get("num_channels", "in_channels", "in_chans", default=3), height, width


def _images(asked: Asked) -> Iterator[Shape]:
    channels, height, width = image_size(asked)
    if {"image_grid_thw", "grid_thw"} & asked.accepted:
        grid, patch = _grid(asked), asked.get("patch_size", default=14)
        depth = channels * asked.get("temporal_patch_size", default=1) * patch * patch
        yield Shape((asked.batch * math.prod(grid), depth))
        yield Shape((asked.batch * math.prod(grid), channels, patch, patch))
        return
    frames = asked.get("num_frames", "frames_per_clip")
    if frames is not None:
        yield Shape((asked.batch, frames, channels, height, width))
    yield Shape((asked.batch, channels, height, width))
    pinpoints = asked.get("image_grid_pinpoints")
    if pinpoints:  # a small copy of the image and as many pieces as the largest grid has
        pieces = max(rows * columns // (height * width) for rows, columns in pinpoints)
        yield Shape((asked.batch, 1 + pieces, channels, height, width))
    yield Shape((asked.batch, 1, channels, height, width))
    yield Shape((asked.batch, 2, channels, height, width))  # a pair to match
    patch = asked.get("patch_size")
    if isinstance(patch, int):
        yield Shape((asked.batch, height // patch * (width // patch), channels * patch * patch))


def _grid(asked: Asked) -> tuple[int, int, int]:
    """Patches in time, height and width of one image."""
    merged = asked.get("spatial_merge_size", default=2)
    return 1, 2 * merged, 2 * merged


def _grids(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, 3), torch.int64, _grid(asked))


def _image_sizes(asked: Asked) -> Iterator[Shape]:
    _, *size = image_size(asked)
    yield Shape((asked.batch, 2), torch.int64, tuple(size))


def _videos(asked: Asked) -> Iterator[Shape]:
    channels, height, width = image_size(asked)
    frames = asked.get("num_frames", "frames_per_clip", default=2)
    yield Shape((asked.batch, frames, channels, height, width))


def _flattened(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, 4, 2 + asked.get("patch_embed_hidden_size", default=768)), fill=1)


def _spectrograms(asked: Asked) -> Iterator[Shape]:
    width = asked.get(
        "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim"
    )
    if width is None:
        return
    # Whisper's encoder takes sounds of one length alone, twice its positions.
    for frames in (FRAMES, 2 * asked.get("max_source_positions", default=FRAMES)):
        yield Shape((asked.batch, width, frames))
        yield Shape((asked.batch, frames, width))
        yield Shape((asked.batch, 1, frames, width))


def _sounds(asked: Asked) -> Iterator[Shape]:
    """Samples of a wave, or a spectrogram of a fixed length."""
    longest, bins = asked.get("max_length"), asked.get("num_mel_bins")
    if bins is not None and longest is not None:
        yield Shape((asked.batch, longest, bins))
    stride = asked.get("samples_per_token") or math.prod(
        asked.get("conv_stride", "upsampling_ratios", default=(320,))
    )
    channels = asked.get("audio_channels")
    if channels is not None:
        yield Shape((asked.batch, channels, stride * FRAMES))
    yield Shape((asked.batch, stride * FRAMES))
    yield Shape((asked.batch, 1, stride * FRAMES))
    if bins is not None:
        yield Shape((asked.batch, FRAMES, bins))


def _series(asked: Asked, length: int) -> Iterator[Shape]:
    channels = asked.get("input_size", "num_input_channels", default=1)
    if asked.get("lags_sequence") is not None and channels == 1:
        yield Shape((asked.batch, length))
    else:
        yield Shape((asked.batch, length, channels))
        yield Shape((asked.batch, length))


def _past_length(asked: Asked) -> int:
    lags = asked.get("lags_sequence", default=(0,))
    return int(asked.get("context_length", default=asked.tokens)) + int(max(lags))


def _past(asked: Asked) -> Iterator[Shape]:
    yield from _series(asked, _past_length(asked))


def _future(asked: Asked) -> Iterator[Shape]:
    yield from _series(asked, asked.get("prediction_length", default=asked.tokens))


def _observed(asked: Asked) -> Iterator[Shape]:
    yield from (Shape(shape.sizes, fill=1) for shape in _past(asked))


def _past_times(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, _past_length(asked), asked.get("num_time_features", default=0)))


def _future_times(asked: Asked) -> Iterator[Shape]:
    length = asked.get("prediction_length", default=asked.tokens)
    yield Shape((asked.batch, length, asked.get("num_time_features", default=0)))


def _categories(asked: Asked) -> Iterator[Shape]:
    count = asked.get("num_static_categorical_features", default=0)
    if count:
        yield Shape((asked.batch, count), torch.int64, 0)


def _static_numbers(asked: Asked) -> Iterator[Shape]:
    count = asked.get("num_static_real_features", default=0)
    if count:
        yield Shape((asked.batch, count))


def _hidden(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, asked.length, asked.get("d_model", "hidden_size", default=1)))


def _boxes(asked: Asked) -> Iterator[Shape]:
    yield Shape((asked.batch, asked.length, 4), torch.int64, (0, 0, 1, 1))


SHAPES: Mapping[str, Shapes] = {
    "input_ids": _ids,
    "qformer_input_ids": _ids,
    "attention_mask": _attended,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "flattened_patches": _flattened,
    "image_grid_thw": _grids,
    "grid_thw": _grids,
    "image_sizes": _image_sizes,
    "input_features": _spectrograms,
    "input_values": _sounds,
    "decoder_input_ids": _decoder_ids,
    "past_values": _past,
    "past_time_features": _past_times,
    "past_observed_mask": _observed,
    "static_categorical_features": _categories,
    "static_real_features": _static_numbers,
    "future_values": _future,
    "future_time_features": _future_times,
    "inputs": _hidden,
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "bbox": _boxes,
}
"""Shapes of every input that can be made, likeliest first."""
