"""Inputs for a tiny model of any kind, made without kbitc: candidates by the names that its forward takes.

The one thing to know: nothing says which layout a model wants, so candidates are tried on the dense model
in turn, the fullest first, and the first that runs is it. A multimodal model gets as many image tokens as its
own ``get_image_features`` gives vectors, or as its error message asks for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
SAMPLES = 3840  # of audio; what strides multiply to divides it
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
    parameters = inspect.signature(model.forward).parameters
    accepted = set(parameters)
    required = {name for name, each in parameters.items() if each.default is each.empty}
    config: Any = getattr(model, "config", None)
    ids = _ids(config)
    for label, feed in _layouts(model, config, ids, accepted):
        asked = required | (accepted & {"visual_feats", "visual_pos"})
        asked |= accepted & {"noise", "timestep"} if "state" in required else set()
        rest = {name: part for name, part in _known(config, ids).items() if name in asked - set(feed)}
        yield label, {**feed, **rest}


def _layouts(
    model: nn.Module, config: Any, ids: Tensor, accepted: set[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if "pixel_values" in accepted and "input_ids" in accepted:
        for label, images in _images(config, accepted):
            asked = {"qformer_input_ids": ids} if "qformer_input_ids" in accepted else {}
            yield from _mixed(model, label, {**images, **asked}, ids, accepted)
    for name in ("input_features", "input_values"):
        if name in accepted and "input_ids" in accepted:
            for label, sound in _sounds(name, model, accepted):
                yield from _mixed(model, label, sound, ids, accepted)
    for name in ("input_values", "input_features"):
        if name in accepted:
            for label, sound in _sounds(name, model, accepted):
                yield label, _completed(sound, ids, accepted)
                mask = torch.ones(1, max(sound[name].shape[1:]), dtype=torch.int64)
                yield f"{label}, masked", _completed({**sound, "attention_mask": mask}, ids, accepted)
    if {"input_values", "input_features"} <= accepted:
        for label, sound in _features(model):
            yield f"audio and {label}", {"input_values": torch.randn(1, 1, SAMPLES), **sound}
    if "past_values" in accepted:
        yield from _series(config, accepted)
    if "states" in accepted:
        yield "states and actions", _trajectory(config)
    if "input_ids" in accepted:
        if "bbox" in accepted:
            corners = torch.tensor([[1, 2, 30, 40]]).expand(TOKENS, 4)[None]
            yield "tokens in boxes", {"input_ids": ids, "bbox": corners}
        yield "tokens", _completed({"input_ids": ids}, ids, accepted)
    if "pixel_values" in accepted:
        for label, images in _images(config, accepted):
            yield label, _completed(images, ids, accepted)
    for name in ("pixel_values_videos", "waveform", "hidden_states"):
        if name in accepted:
            size = (1, 4, 3, *_image_size(config)) if "video" in name else (1, 1, SAMPLES)
            yield name, {name: torch.randn(size)}
    if {"hidden_states", "grid_thw"} <= accepted:
        for _, patches in _patches(config):
            yield "patches", {"hidden_states": patches["pixel_values"], "grid_thw": patches["image_grid_thw"]}


def _known(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """What some models ask for besides; by name."""

    def size(name: str) -> int:
        return getattr(config, name, None) or 4

    return {
        "qformer_input_ids": ids,
        "visual_feats": torch.randn(1, 4, size("visual_feat_dim")),
        "visual_pos": torch.rand(1, 4, size("visual_pos_dim")),
        "state": torch.randn(1, size("max_state_dim")),
        "noise": torch.randn(1, size("chunk_size"), size("max_action_dim")),
        "timestep": torch.rand(1),
        "attention_mask": torch.ones_like(ids),
    }


def _trajectory(config: Any) -> dict[str, Tensor]:
    return {
        "states": torch.randn(1, 4, config.state_dim),
        "actions": torch.randn(1, 4, config.act_dim),
        "rewards": torch.randn(1, 4, 1),
        "returns_to_go": torch.randn(1, 4, 1),
        "timesteps": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4, dtype=torch.int64),
    }


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
    for name in (
        "vision_config",
        "vq_config",
        "backbone_config",
        "vision_encoder_config",
        "vlm_config",
        "encoder",
    ):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            return _vision_config(part)
    return config


def _image_size(config: Any) -> tuple[int, int]:
    sizes = (getattr(part, "image_size", None) for part in (_vision_config(config), config))
    size = next((value for value in sizes if value), 64)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _images(config: Any, accepted: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    vision = _vision_config(config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    height, width = _image_size(config)
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in accepted), None)
    for label, patches in _patches(config) if grid else ():
        yield label, {"pixel_values": patches["pixel_values"], f"{grid}": patches["image_grid_thw"]}
    image, sizes = torch.randn(1, channels, height, width), torch.tensor([[height, width]])
    yield from _flat_patches(vision, channels, accepted)
    yield "image", {"pixel_values": image}
    if "image_sizes" in accepted:
        yield "sized image", {"pixel_values": image, "image_sizes": sizes}
        tiles = torch.randn(1, 3, channels, height, width)
        yield "tiled image", {"pixel_values": tiles, "image_sizes": sizes}
        yield "tiled image", {"pixel_values": torch.cat([tiles, tiles[:, :2]], 1), "image_sizes": 2 * sizes}
    yield "images", {"pixel_values": image[None]}
    if "pixel_attention_mask" in accepted:
        yield "masked images", {"pixel_values": image[None], "pixel_attention_mask": torch.ones(1, 1).bool()}
    yield "pair of images", {"pixel_values": torch.randn(1, 2, channels, height, width)}
    frames = getattr(vision, "num_frames", None) or 4
    yield "video", {"pixel_values": torch.randn(1, frames, channels, height, width)}


def _flat_patches(vision: Any, channels: int, accepted: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """An image of 4 x 4 patches, a row each, for models that are told where each patch is."""
    patch = getattr(vision, "patch_size", 16)
    if not isinstance(patch, int):
        return
    pixels = torch.randn(1, 16, channels * patch * patch)
    grid, places = torch.tensor([[4, 4]]), torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    if "spatial_shapes" in accepted:
        mask = torch.ones(1, 16, dtype=torch.int64)
        flat = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grid}
        yield "flat patches", {name: value for name, value in flat.items() if name in accepted}
    for name in ("image_position_ids", "pixel_position_ids"):
        if name in accepted:
            yield "placed patches", {"pixel_values": pixels, name: places}
    if "target_sizes" in accepted:
        row = torch.randn(1, channels, patch, 16 * patch)
        yield "row of patches", {"pixel_values": row, "target_sizes": grid}


def _patches(config: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    vision = _vision_config(config)
    patch, time = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    if not isinstance(patch, int):
        return
    grid = torch.tensor([[1, 4, 4]])
    for size in dict.fromkeys(
        ((channels * time * patch**2,), (channels * 2 * patch**2,), (channels, patch, patch))
    ):
        yield "patches", {"pixel_values": torch.randn(16, *size), "image_grid_thw": grid}


def _sounds(name: str, model: nn.Module, accepted: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Samples or features, with masks of their own where the model takes some."""
    if name == "input_values":
        yield "audio", {name: torch.randn(1, SAMPLES)}
        yield "spectrogram", _spectrogram(model.config)
        yield "audio in a channel", {name: torch.randn(1, 1, SAMPLES)}
        return
    masks = accepted & {"input_features_mask", "feature_attention_mask"}
    for label, sound in _features(model):
        frames = sound[name].shape[1 if label == "sound in frames" else -1]
        yield label, {**sound, **dict.fromkeys(masks, torch.ones(1, frames, dtype=torch.int64))}


def _features(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in ("audio_config", "encoder_config", "encoder"))]
    names = (
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "feature_projection_input_dim",
    )
    sizes = [getattr(part, name, None) for part in parts if part is not None for name in names]
    named = next((size for size in sizes if isinstance(size, int)), 80)
    read = next((size for module in model.modules() if (size := _read_by(module))), named)
    longest = next((most for part in parts if (most := getattr(part, "max_source_positions", None))), None)
    if size := next((size for part in parts if (size := getattr(part, "spec_size", None))), None):
        yield "spectrogram", {"input_features": torch.randn(1, 1, size * (size // named), named)}
    for bins in dict.fromkeys((named, read, 128)):
        for frames in dict.fromkeys((2 * longest if longest else FRAMES, FRAMES)):
            yield "sound", {"input_features": torch.randn(1, bins, frames)}
            yield "sound in frames", {"input_features": torch.randn(1, frames, bins)}


def _read_by(module: nn.Module) -> int | None:
    """Width of what a first layer takes."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels if isinstance(module, nn.Conv1d) and module.in_channels > 1 else None


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
    token = _placeholder(model.config, kind)
    if token is None:
        yield f"tokens and {label}", _completed({"input_ids": ids, **extra}, ids, accepted)
        return

    def feed(count: int) -> dict[str, Tensor]:
        mixed = torch.cat([ids[:, :2], torch.full((1, count), token), ids[:, 2:]], dim=1)
        whole = {"input_ids": mixed, "attention_mask": torch.ones_like(mixed), **extra}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in accepted:
                whole[name] = (mixed == token).long()
        return _completed(whole, ids, accepted)

    if count := _vectors(model, kind, extra) or _asked_for(model, feed(1)):
        yield f"tokens and {label}", feed(count)


def _placeholder(config: Any, kind: str) -> int | None:
    """The token in whose place a vector of an image or a sound stands."""
    names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id", "media_placeholder_token_id"]
    names += ["video_token_index"] if kind == "image" else []
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _vectors(model: Any, kind: str, extra: dict[str, Tensor]) -> int:
    """How many token places an image or a sound takes; 0 where the model does not say."""
    kinds = (kind, "video") if kind == "image" else (kind,)
    places = [(owner, each) for each in kinds for owner in (getattr(model, "model", None), model)]
    function = next(
        (f for owner, each in places if (f := getattr(owner, f"get_{each}_features", None))), None
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


def _asked_for(model: Any, feed: dict[str, Tensor]) -> int:
    """How many places a model asks for when it is given one; 0 where it does not say."""
    try:
        with torch.no_grad():
            model(**feed)
    except Exception as error:  # noqa: BLE001  # whatever a model says of wrong inputs
        found = re.search(r"tokens do not match\D*1\D+(\d+)", str(error))
        return int(found[1]) if found else 0
    return 1
