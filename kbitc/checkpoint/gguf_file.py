"""A GGUF file, llama.cpp's format: dequantized one tensor at a time.

The one thing to know: blocks become float16, plain tensors keep their dtype. Config, names and the
order of rows come from transformers, which has two ways: rules like those of safetensors for some
architectures, "tensor processors" for the others (see `gguf_processors`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint import companions
from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.checkpoint.gguf_header import Block, Header
from kbitc.checkpoint.gguf_processors import Processed
from kbitc.checkpoint.linked import Linked, link
from kbitc.checkpoint.room import Room
from kbitc.checkpoint.skeletons import build, load_config, model_classes
from kbitc.errors import BackendUnavailable, SourceError, first_line
from kbitc.system.checksums import fingerprint

ROPE_FREQS = "rope_freqs.weight"

_log = logging.getLogger(__name__)


class GgufFile(Checkpoint):
    """Reader of one file.

    Raises:
        BackendUnavailable: the package gguf is missing.
        SourceError: damaged, split, of an unknown architecture, or without a tensor of the model.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or str(path)
        try:
            import gguf  # noqa: F401  # transformers needs it too
        except ImportError as error:
            raise BackendUnavailable(
                f"{self.label}: reading GGUF needs the package 'gguf': pip install 'kbitc[gguf]'"
            ) from error
        header = Header.of(path, self.label)
        self.blocks = header.blocks
        self.architecture = _architecture(header, path, self.label)
        self._room = Room.of(block.info.shape for block in self.blocks.values())
        self._room.check_config(header.metadata, self.label)
        self._ignored: list[str] = []
        self._linked = self._link()

    def _link(self) -> Linked:
        config = load_config(self.path.parent, self.label, gguf_file=self.path.name)
        classes = model_classes(config, self.label)
        # Nearly all GGUF files are of causal models; the file itself does not say.
        causal = [kind for kind in classes if kind.__name__.endswith("ForCausalLM")]
        model = build((causal or classes)[0], config, self.label, self._room, _main_dtype(self.blocks))
        sources = {name: block.info for name, block in self.blocks.items()}
        rules = _rules(self.architecture, model)
        if rules is not None:
            linked = link(model, sources, rules, self._read_block, self.label)
            self._ignored = list(linked.ignored)
        else:
            processed = Processed.of(self.architecture, model, sources, self._read_block, self.label)
            linked = link(model, processed.infos, [], processed.read, self.label)
            self._ignored = list(processed.unused)
        if ROPE_FREQS in self._ignored:
            _log.warning(
                "%s: has scaled rotary frequencies (%s), which transformers does not take from GGUF "
                "files; long contexts may differ from llama.cpp's",
                self.label,
                ROPE_FREQS,
            )
        return linked

    def _read_block(self, name: str) -> Tensor:
        return self.blocks[name].read()

    def skeleton(self) -> nn.Module:
        """See `Checkpoint`."""
        return self._linked.model

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint`."""
        return self._linked.infos

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._linked.read(name)

    def ignored(self) -> list[str]:
        """See `Checkpoint`."""
        return list(self._ignored)

    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        return fingerprint({self.path: [(b.offset, b.nbytes) for b in self.blocks.values()]})

    def save_companions(self, folder: Path) -> None:
        """See `Checkpoint`; the tokenizer is converted by transformers."""
        from transformers import AutoTokenizer

        model: Any = self._linked.model
        data = {
            **json.loads(model.config.to_json_string()),
            "architectures": [type(model).__name__],
        }
        companions.write_config(data, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001  # a model without a tokenizer is still worth having
            _log.warning(
                "%s: transformers cannot convert its tokenizer (%s); copy the tokenizer files of the "
                "original model into %s",
                self.label,
                first_line(error),
                folder,
            )
            return
        tokenizer.save_pretrained(folder)


def _architecture(header: Header, path: Path, label: str) -> str:
    """The architecture of a file that is a whole model.

    Raises:
        SourceError: it is a part of one, or says nothing.
    """
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(
            f"{label}: is one of {parts} parts of a model; join them first: llama-gguf-split "
            f"--merge {path.name} whole.gguf"
        )
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError(f"{label}: does not say which architecture it is of (general.architecture)")
    return architecture


def _main_dtype(blocks: Mapping[str, Block]) -> torch.dtype:
    """Of the matrices: norms are float32 in every file."""
    matrices = [block.info for block in blocks.values() if len(block.info.shape) > 1]
    return max(matrices, key=lambda info: info.nbytes).dtype if matrices else torch.float32


def _rules(architecture: str, model: Any) -> list[Any] | None:
    """Transformers' conversion rules for an architecture, or None if it is one with a processor."""
    from transformers.integrations.gguf.utils import (
        get_gguf_conversion_mapping,
        is_gguf_arch_supported,
    )

    if not is_gguf_arch_supported(architecture):
        return None
    rules: list[Any] = get_gguf_conversion_mapping(architecture, model.config)
    return rules
