"""The small files beside the weights that an artifact needs too: config, tokenizer, processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG = "config.json"
CODE = "*.py"  # a tokenizer's own code: copied for those who trust it, never run here
PATTERNS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "*vocab.json",
    "merges.txt",
    "bpe.codes",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)


def copy_files(source: Path, folder: Path) -> None:
    """Copy every companion file but the config; links are followed, so that a hub cache works."""
    for pattern in (*PATTERNS, CODE):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write config.json without a quantization entry."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
