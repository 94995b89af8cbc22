"""A GGUF file: llama.cpp's format, read and dequantized one tensor at a time.

The one thing to know: config, names and the re-ordering of rows come from transformers' GGUF tables;
blocks are dequantized by the ``gguf`` package and kept in float16 (float32 tensors stay float32).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo, build_skeleton, stored_names
from kbitc.errors import BackendUnavailable, SourceError


class GgufFile:
    """Reader of one file.

    Raises:
        BackendUnavailable: the package gguf is missing.
        SourceError: damaged, of an unknown architecture, or a tensor that the model needs is missing.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        self.path = path
        try:
            import gguf
        except ImportError as error:
            raise BackendUnavailable(
                f"{label}: reading GGUF needs the package 'gguf': pip install kbitc[gguf]"
            ) from error
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        self._gguf: Any = gguf
        try:
            self._reader = gguf.GGUFReader(path)
            self._parsed: dict[str, Any] = load_gguf_checkpoint(path, return_tensors=False)
        except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise SourceError(f"{label}: not a GGUF model that can be read: {error}") from error
        self.architecture = self._text("general.architecture")
        self._model = self.skeleton()
        self._places = self._match()
        self._infos = self._describe()

    def _text(self, key: str) -> str:
        field = self._reader.fields[key]
        return bytes(field.parts[field.data[0]]).decode("utf-8")

    def _config(self) -> Any:
        from transformers import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        values = dict(self._parsed["config"])
        kind = values.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise SourceError(f"{self.label}: transformers has no model type '{kind}'")
        config = CONFIG_MAPPING[kind](**values)
        config.dtype = torch.float16
        if not config.architectures:
            if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                raise SourceError(f"{self.label}: '{kind}' is not a causal language model of transformers")
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
        return config

    def skeleton(self) -> nn.Module:
        """See :class:`Checkpoint`."""
        return build_skeleton(self._config(), self.label)

    def _match(self) -> dict[str, Any]:
        """The file's tensor of each of the model's, by its first name."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        kind = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        make: Any = kind
        self._processor: Any = make(config=self._parsed["config"])
        names: Any = get_gguf_hf_weights_map
        self._hf_name: dict[str, str] = names(self._model, self._processor)
        first = {alias: name for name, aliases in stored_names(self._model).items() for alias in aliases}
        places: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            name = first.get(self._hf_name.get(tensor.name, ""))
            if name is not None:
                places.setdefault(name, tensor)
        missing = [name for name in stored_names(self._model) if name not in places]
        if missing:
            raise SourceError(
                f"{self.label}: the file lacks {len(missing)} tensors of {type(self._model).__name__}, the "
                f"first is '{missing[0]}'; kbitc reads GGUF files with one file tensor a model tensor"
            )
        return places

    def _describe(self) -> dict[str, TensorInfo]:
        shapes = {name: tuple(t.shape) for name, t in self._model.state_dict(keep_vars=True).items()}
        infos = {}
        for name in stored_names(self._model):
            tensor = self._places[name]
            infos[name] = TensorInfo(shapes[name], self._dtype(tensor), int(tensor.n_bytes))
        return infos

    def _dtype(self, tensor: Any) -> torch.dtype:
        kinds = self._gguf.GGMLQuantizationType
        return torch.float32 if tensor.tensor_type == kinds.F32 else torch.float16

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See :class:`Checkpoint`."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """See :class:`Checkpoint`."""
        tensor = self._places[name]
        dense = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        done = self._processor.process(
            weights=dense, name=tensor.name, tensor_key_mapping=self._hf_name, parsed_parameters=self._parsed
        )
        found = torch.from_numpy(np.array(done.weights)).to(self._dtype(tensor))
        if tuple(found.shape) != self._infos[name].shape:
            raise SourceError(
                f"{self.label}: '{name}' is {tuple(found.shape)} in the file, but the model has "
                f"{self._infos[name].shape}"
            )
        return found

    def fingerprint(self) -> str:
        """See :class:`Checkpoint`."""
        stat = self.path.stat()
        return hashlib.sha256(f"{self.path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    def save_companions(self, folder: Path) -> None:
        """See :class:`Checkpoint`."""
        from transformers import AutoTokenizer

        self._config().save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        tokenizer.save_pretrained(folder)

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass
