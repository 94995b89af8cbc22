"""GGUF architectures that transformers converts with "tensor processors": names, then numpy code.

The one thing to know: a processor takes one of the file's tensors and returns it permuted, or puts
its part of a merged tensor into a dictionary. Here it is called for one model tensor at a time,
with a dictionary of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo
from kbitc.checkpoint.conversion import ReadSource
from kbitc.checkpoint.names import tensor_of
from kbitc.errors import SourceError, first_line


class _Outline:
    """What the name map looks at: a model's names, and those of the models inside it.

    For every module that it is shown, ``get_gguf_hf_weights_map`` builds the table of the whole
    architecture: 8 s for 30 layers of 13 modules, and quadratic. Only models have names in it.
    """

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._names = list(model.state_dict())
        self._children = [
            (name, _Outline(child))
            for name, child in model.named_children()
            if hasattr(child, "config") and hasattr(child, "base_model_prefix")
        ]

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self._names)

    def named_children(self) -> list[tuple[str, _Outline]]:
        return self._children


@dataclass(frozen=True)
class Processed:
    """The tensors of a file under the model's names.

    Attributes:
        processor: transformers'.
        names: the file's name, as the processor knows it, to the model's.
        parts: the model's name to the file's tensors that it is made from.
        infos: what ``read`` gives, by the model's name.
        unused: the file's tensors that nothing is made from.
        read_block: reads one of the file's tensors.
    """

    processor: Any
    names: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]
    infos: Mapping[str, TensorInfo]
    unused: tuple[str, ...]
    read_block: ReadSource

    @staticmethod
    def of(
        architecture: str,
        model: nn.Module,
        blocks: Mapping[str, TensorInfo],
        read_block: ReadSource,
        label: str,
    ) -> Processed:
        """Match a file's tensors to a model's.

        Raises:
            SourceError: the gguf package does not know the architecture.
        """
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        config: Any = model.config
        make: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        processor = make(config=config.to_dict())
        name_map: Any = get_gguf_hf_weights_map
        try:
            names: dict[str, str] = name_map(_Outline(model), processor)
        except NotImplementedError as error:
            raise SourceError(f"{label}: {first_line(error)}.") from error
        parts: dict[str, tuple[str, ...]] = {}
        for block in blocks:
            # Merged experts are mapped without the suffix.
            target = names.get(block) or names.get(block.removesuffix(".weight"))
            if target is not None:
                parts[target] = (*parts.get(target, ()), block)
        infos = {name: _info(model, name, [blocks[part] for part in names]) for name, names in parts.items()}
        used = {part for names in parts.values() for part in names}
        unused = tuple(block for block in blocks if block not in used)
        return Processed(processor, names, parts, infos, unused, read_block)

    def read(self, name: str) -> Tensor:
        """One tensor by the model's name.

        Raises:
            SourceError: the file's tensors do not make it up.
        """
        info = self.infos[name]
        merged: dict[str, Any] = {"tensors": {}}
        whole: Tensor | None = None
        for part in self.parts[name]:
            data = self.read_block(part)
            # numpy has no bfloat16; float32 holds it exactly.
            array = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
            done = self.processor.process(
                weights=array, name=part, tensor_key_mapping=self.names, parsed_parameters=merged
            )
            if done.name is not None:
                whole = torch.from_numpy(np.ascontiguousarray(done.weights))
        made: Tensor | None = merged["tensors"].get(name, whole)
        if made is None or tuple(made.shape) != info.shape:
            shape = None if made is None else tuple(made.shape)
            raise SourceError(
                f"'{name}' is {shape} when made from {', '.join(self.parts[name])} of the GGUF "
                f"file, but {info.shape} in the model; the file was written for another version of "
                "the architecture"
            )
        return made.to(info.dtype)


def _info(model: nn.Module, name: str, parts: list[TensorInfo]) -> TensorInfo:
    """Processors permute, transpose, add a dimension: sizes are checked now, shapes when read."""
    wanted = tuple(tensor_of(model, name).shape)
    info = TensorInfo.of(wanted, parts[0].dtype)
    numel = sum(torch.Size(part.shape).numel() for part in parts)
    return info if numel == torch.Size(wanted).numel() else TensorInfo.of(parts[0].shape, parts[0].dtype)
