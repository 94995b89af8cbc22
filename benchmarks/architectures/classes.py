"""Every model class of transformers' auto mappings, by kind, and what the shrinker cannot know of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TABLES = {
    "causal": ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "multimodal": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISUAL_QUESTION_ANSWERING"),
    "audio": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM"),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "OBJECT_DETECTION",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "VIDEO_CLASSIFICATION",
    ),
    "time series": ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION"),
    "classifier": ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"),
}
"""Auto mappings (``MODEL_FOR_..._MAPPING_NAMES``) of each kind; a model type takes the first that has it."""

BACKBONE = "backbone"

_ROTARY = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "is_decoder": True},
    "cohere_compass_text": {"rope_parameters": _ROTARY},
    "cohere_compass": {"text_config.rope_parameters": _ROTARY},
    "step3p7": {"text_config.sliding_window": 16},
    "paddleocr_vl": {"text_config.rope_parameters": _ROTARY["full_attention"]},
    "efficientloftr": {"num_attention_heads": 8},
    "lightglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "superpoint": {"keypoint_decoder_dim": 65},
    "deepseek_ocr2": {"vision_config.sam_config.downsample_channels": [32, 64]},
    "uvdoc": {
        "backbone_config.out_features": [f"stage{i}" for i in range(1, 7)],
        "backbone_config.out_indices": [*range(1, 7)],
    },
    "mistral_large4_text": {"kv_source_layers": None},
    "mistral_large4": {"text_config.kv_source_layers": None},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "align": {"vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.3},
}
"""Fields that no rule of names gets right, by model type and path."""


@dataclass(frozen=True)
class ModelClass:
    """A class to try.

    Attributes:
        name: of the class in transformers.
        model_type: of its config.
        kind: a key of `TABLES`, or "backbone" where a model type has no head.
    """

    name: str
    model_type: str
    kind: str


def model_classes(*, every_head: bool = False) -> list[ModelClass]:
    """One class of each model type, its most typical head; or every class of every head.

    Sorted by kind and model type.
    """
    from transformers.models.auto import configuration_auto, modeling_auto

    rows = [
        (kind, f"MODEL_FOR_{table}_MAPPING_NAMES")
        for kind, tables in TABLES.items()
        for table in tables
        if kind != "classifier" or every_head
    ]
    found: dict[tuple[str, str], ModelClass] = {}
    taken: set[str] = set()
    for kind, table in [*rows, (BACKBONE, "MODEL_MAPPING_NAMES")]:
        for model_type, names in getattr(modeling_auto, table).items():
            name = names if isinstance(names, str) else names[0]
            is_new = every_head or model_type not in taken
            if is_new and model_type in configuration_auto.CONFIG_MAPPING_NAMES:
                taken.add(model_type)
                found.setdefault((name, model_type), ModelClass(name, model_type, kind))
    order = [*TABLES, BACKBONE]
    return sorted(found.values(), key=lambda each: (order.index(each.kind), each.model_type, each.name))


def spread(classes: list[ModelClass], limit: int | None) -> list[ModelClass]:
    """``limit`` of them, evenly over the list, so that every kind is among them."""
    if limit is None or limit >= len(classes):
        return classes
    return [classes[i * len(classes) // limit] for i in range(limit)]
