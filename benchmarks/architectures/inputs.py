"""Inputs for a tiny model of any kind, made without kbitc: candidates by the names that its forward takes.

The one thing to know: nothing says which layout a model wants, so candidates are tried on the dense model
in turn, the fullest first, and the first that runs is it. A multimodal model gets as many image tokens as its
own ``get_image_features`` gives vectors.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
SAMPLES = 4000  # of audio
FRAMES = 64


class NoInputsError(Exception):
    """None of the candidates runs; the message is of the last one."""


def inputs_for(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """What to call the inputs, and keyword inputs of batch 1 that the dense model takes.

    Raises:
        NoInputsError: the harness does not know this model's inputs.
    """
    failures = []
    for label, feed in _candidates(model):
        try:
            with torch.no_grad():
                model(**feed)
        except Exception as error:  # noqa: BLE001  # whatever a model says of wrong inputs
            failures.append(f"{label}: {(str(error).splitlines() or [''])[0][:80]}")
        else:
            return label, feed
    raise NoInputsError("; ".join(failures) or "no candidate")


def _candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    accepted = set(inspect.signature(model.forward).parameters)
    config: Any = getattr(model, "config", None)
    ids = _ids(config)
    if "pixel_values" in accepted and "input_ids" in accepted:
        for label, images in _images(config, accepted):
            yield from _mixed(model, label, images, ids, accepted)
    if "input_features" in accepted and "input_ids" in accepted:
        for label, sound in _features(config):
            yield from _mixed(model, label, sound, ids, accepted)
    if "input_values" in accepted and "input_ids" not in accepted:
        audio = {"input_values": torch.randn(1, SAMPLES)}
        yield "audio", _completed(audio, ids, accepted)
        yield "spectrogram", _completed(_spectrogram(config), ids, accepted)
        yield "audio in a channel", {"input_values": torch.randn(1, 1, SAMPLES)}
    if "input_features" in accepted and "input_ids" not in accepted:
        for label, sound in _features(config):
            yield label, _completed(sound, ids, accepted)
            length = max(sound["input_features"].shape[1:])
            yield f"{label}, masked", {**sound, "attention_mask": torch.ones(1, length, dtype=torch.int64)}
    if "past_values" in accepted:
        yield from _series(config, accepted)
    if "input_ids" in accepted:
        yield "tokens", _completed({"input_ids": ids}, ids, accepted)
        boxes = torch.zeros(1, TOKENS, 4, dtype=torch.int64)
        yield "tokens in boxes", {"input_ids": ids, "bbox": boxes}
    if "pixel_values" in accepted:
        for label, images in _images(config, accepted):
            yield label, _completed(images, ids, accepted)
    for name in ("pixel_values_videos", "input_values", "waveform", "hidden_states"):
        if name in accepted:
            size = (1, 4, 3, *_image_size(config)) if "video" in name else (1, 1, SAMPLES)
            yield name, {name: torch.randn(size)}
    if {"hidden_states", "grid_thw"} <= accepted:
        patches = {key: value for _, feed in _patches(config) for key, value in feed.items()}
        yield "patches", {"hidden_states": patches["pixel_values"], "grid_thw": patches["image_grid_thw"]}


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=False)
    except (AttributeError, ValueError):
        return config


def _ids(config: Any) -> Tensor:
    vocabulary = getattr(_text_config(config), "vocab_size", None)
    vocabulary = vocabulary if isinstance(vocabulary, int) and vocabulary > 8 else 64
    # Below the numbers that the shrinker gives to special tokens, above those that stay.
    return torch.randint(4, max(5, min(vocabulary, 200)), (1, TOKENS))


def _completed(feed: Mapping[str, Tensor], ids: Tensor, accepted: set[str]) -> dict[str, Tensor]:
    """With the decoder's ids."""
    whole = dict(feed)
    if "decoder_input_ids" in accepted:
        whole["decoder_input_ids"] = ids[:, :-1]
    return whole


def _vision_config(config: Any) -> Any:
    for name in ("vision_config", "vq_config", "backbone_config", "vision_encoder_config", "encoder"):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            return part
    return config


def _image_size(config: Any) -> tuple[int, int]:
    sizes = (getattr(part, "image_size", None) for part in (_vision_config(config), config))
    size = next((value for value in sizes if value), 64)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _images(config: Any, accepted: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    vision = _vision_config(config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    height, width = _image_size(config)
    if "image_grid_thw" in accepted or "grid_thw" in accepted:
        yield from _patches(config)
    yield "image", {"pixel_values": torch.randn(1, channels, height, width)}
    sizes = torch.tensor([[height, width]])
    if "image_sizes" in accepted:
        yield "sized image", {"pixel_values": torch.randn(1, channels, height, width), "image_sizes": sizes}
        tiles = torch.randn(1, 3, channels, height, width)
        yield "tiled image", {"pixel_values": tiles, "image_sizes": sizes}
    yield "images", {"pixel_values": torch.randn(1, 1, channels, height, width)}
    frames = getattr(vision, "num_frames", None) or 4
    yield "video", {"pixel_values": torch.randn(1, frames, channels, height, width)}
    patch = getattr(vision, "patch_size", 16)
    if isinstance(patch, int):
        mask = torch.ones(1, 16, dtype=torch.int64)
        flat = {
            "pixel_values": torch.randn(1, 16, channels * patch * patch),
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[4, 4]]),
        }
        yield "flat patches", {name: value for name, value in flat.items() if name in accepted}


def _patches(config: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    vision = _vision_config(config)
    patch, time = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    pixels = torch.randn(16, channels * time * patch * patch)
    yield "patches", {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _features(config: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    parts = [config, *(getattr(config, name, None) for name in ("audio_config", "encoder_config", "encoder"))]
    names = (
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "feature_projection_input_dim",
    )
    sizes = [getattr(part, name, None) for part in parts if part is not None for name in names]
    bins = next((size for size in sizes if isinstance(size, int)), 80)
    longest = next((getattr(p, "max_source_positions", None) for p in parts if p is not None), None)
    for frames in dict.fromkeys((2 * longest if isinstance(longest, int) else FRAMES, FRAMES)):
        yield "sound", {"input_features": torch.randn(1, bins, frames)}
        yield "sound in frames", {"input_features": torch.randn(1, frames, bins)}


def _spectrogram(config: Any) -> dict[str, Tensor]:
    length, bins = getattr(config, "max_length", FRAMES), getattr(config, "num_mel_bins", 80)
    return {"input_values": torch.randn(1, length, bins)}


def _series(config: Any, accepted: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    length = getattr(config, "context_length", None) or 32
    channels = getattr(config, "num_input_channels", 1)
    past = torch.randn(1, length, channels)
    yield "series", {"past_values": past}
    lags = max(getattr(config, "lags_sequence", None) or [0])
    ahead = getattr(config, "prediction_length", None) or 8
    size = (1, length + lags)
    features = getattr(config, "num_time_features", 0)
    full = {
        "past_values": torch.randn(size),
        "past_time_features": torch.randn(*size, features),
        "past_observed_mask": torch.ones(size),
        "future_values": torch.randn(1, ahead),
        "future_time_features": torch.randn(1, ahead, features),
    }
    yield "series with features", {name: value for name, value in full.items() if name in accepted}
    yield "flat series", {"past_values": past[..., 0], "freq": torch.zeros(1, 1, dtype=torch.int64)}
    yield "plain series", {"past_values": past[..., 0]}


def _mixed(
    model: Any, label: str, extra: dict[str, Tensor], ids: Tensor, accepted: set[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Tokens together with images or sound: as many places among the tokens as there are vectors."""
    kind = "image" if "pixel_values" in extra else "audio"
    token = next(
        (
            value
            for name in (f"{kind}_token_id", f"{kind}_token_index")
            if isinstance(value := getattr(model.config, name, None), int)
        ),
        None,
    )
    if token is None:
        yield f"tokens and {label}", _completed({"input_ids": ids, **extra}, ids, accepted)
        return
    count = _vectors(model, kind, extra)
    if count:
        places = torch.full((1, count), token)
        mixed = torch.cat([ids[:, :2], places, ids[:, 2:]], dim=1)
        feed = {"input_ids": mixed, "attention_mask": torch.ones_like(mixed), **extra}
        if "mm_token_type_ids" in accepted:
            feed["mm_token_type_ids"] = (mixed == token).long()
        if "token_type_ids" in accepted:
            feed["token_type_ids"] = (mixed == token).long()
        yield f"tokens and {label}", feed


def _vectors(model: Any, kind: str, extra: dict[str, Tensor]) -> int:
    """How many token places an image or a sound takes; 0 where the model does not say."""
    function = getattr(model, f"get_{kind}_features", None) or getattr(
        getattr(model, "model", None), f"get_{kind}_features", None
    )
    if function is None:
        return 0
    try:
        with torch.no_grad():
            found = function(**extra)
    except Exception:  # noqa: BLE001  # not this layout
        return 0
    found = getattr(found, "pooler_output", None) if not isinstance(found, (Tensor, list, tuple)) else found
    parts = [found] if isinstance(found, Tensor) else list(found or ())
    return sum(part.shape[:-1].numel() for part in parts if isinstance(part, Tensor))
