"""From an artifact to one GGUF file.

before:  codes in bit planes, scales beside them, under the names of transformers
after:   blocks of llama.cpp's types under its names, with the same values; vectors at 32 bits, what the plan
         left alone at 16; tokenizer and chat template in the header
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kbitc.artifact.loading import check_config
from kbitc.artifact.plan_file import WeightEntry
from kbitc.artifact.reader import Artifact
from kbitc.backends._exported import check_formats
from kbitc.backends.gguf_export.architectures import (
    Architecture,
    architecture_of,
    frequencies_of,
    header_of,
    names_of,
    order_of,
    vector_of,
)
from kbitc.backends.gguf_export.blocks import KINDS, SMALL, blocks_of, kind_of
from kbitc.backends.gguf_export.target import padded
from kbitc.backends.gguf_export.vocabulary import vocabulary_of
from kbitc.checkpoint.companions import CONFIG
from kbitc.checkpoint.dense import tokenizer_in
from kbitc.errors import SourceError, UsageError
from kbitc.formats.packed import Packed
from kbitc.formats.spec import SUPER_BLOCK
from kbitc.system import files
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.version import VERSION

Array: TypeAlias = npt.NDArray[Any]

GGUF = "gguf"
MIXED = 1024
"""llama.cpp's "guessed" file type, of files with tensors of several."""
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Laid:
    """One tensor of the file; its bytes are made when they are written.

    Attributes:
        name: there.
        kind: name of the type.
        shape: of ``make``'s array, rows first.
        dtype: of that: uint8 of blocks.
        make: the array, and how much of scales is lost at most (`blocks_of`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    make: Callable[[], tuple[Array, float]]

    @property
    def nbytes(self) -> int:
        """Bytes, without what fills up to the next tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def export_gguf(model: nn.Module | str | Path, file: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write an artifact as a GGUF file.

    Args:
        model: a compiled artifact of a model of transformers.
        file: where to write.
        force: replace an earlier file.

    Returns:
        ``kind``, ``file_bytes``, ``tensor_bytes`` and, of each packed weight, ``weights``.

    Raises:
        UsageError: a module in memory, weights in formats or a model of an architecture that llama.cpp does
            not have, or the file exists or cannot be written.
        SourceError: not an artifact, or not of a model of transformers.
    """
    if isinstance(model, nn.Module):
        raise UsageError("GGUF is written from an artifact; compile with out=FOLDER, or kbitc.save")
    path = Path(file)
    if path.is_dir() or (files.exists(path) and not force):
        how = (
            "is a folder, not a file; remove it"
            if path.is_dir()
            else "exists already; pass --force to replace it,"
        )
        raise UsageError(f"{path}: {how} or name another file with -o")
    artifact = Artifact.open(Path(model))
    if not (artifact.folder / CONFIG).exists():
        raise SourceError(f"{model}: holds the weights of a plain module, which llama.cpp cannot build")
    check_config(artifact)
    instead = (
        f"It holds {', '.join(map(str, KINDS))}, with +sb in rows of multiples of {SUPER_BLOCK} and of "
        f"{SMALL} without; 'kbitc compile MODEL --bits B --for gguf' plans so"
    )
    check_formats(artifact, _is_held, "llama.cpp", instead)
    source = _Source.of(artifact)
    artifact.verify()
    try:
        with files.scratch_beside(path) as scratch:
            weights, nbytes = source.write(scratch)
            size = scratch.stat().st_size
            scratch.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was written"
        ) from error
    return {
        "kbitc": VERSION,
        "kind": GGUF,
        "parameters": artifact.plan.parameters,
        "weights": weights,
        "tensor_bytes": nbytes,
        "file_bytes": size,
    }


def _is_held(_: str, entry: WeightEntry) -> bool:
    width = entry.shape[-2 if entry.is_transposed else -1]
    return entry.view_of is None and kind_of(entry.spec, width) is not None


@dataclass(frozen=True)
class _Source:
    """An artifact, and how llama.cpp has its model."""

    artifact: Artifact
    config: Any
    architecture: Architecture
    names: Mapping[str, str]
    header: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(artifact: Artifact) -> _Source:
        from transformers import AutoConfig

        label = str(artifact.folder)
        config = AutoConfig.from_pretrained(artifact.folder, trust_remote_code=False)
        architecture = architecture_of(config, label)
        names = [*artifact.plan.weights, *artifact.plan.left_alone]
        there = names_of(names, config, architecture, label)
        own = [(f"{architecture.name}.{k}", v) for k, v in header_of(config, architecture, label)]
        tokenizer = tokenizer_in(artifact.folder)
        if tokenizer is None:
            raise SourceError(
                f"{label}: has no tokenizer, which a GGUF file holds; add its files to the folder"
            )
        vocabulary = vocabulary_of(tokenizer, config.vocab_size, label)
        own += [(f"tokenizer.{key}", value) for key, value in vocabulary]
        return _Source(artifact, config, architecture, there, tuple(own))

    def write(self, file: Path) -> tuple[dict[str, Any], int]:
        """Returns the report of the packed weights, and the bytes of all tensors."""
        import gguf

        laid = list(self._laid())
        writer = gguf.GGUFWriter(file, self.architecture.name)
        report, packed = {}, self.artifact.plan.packed
        try:
            writer.add_file_type(MIXED)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_string("kbitc.version", VERSION)
            for key, value in self.header:
                _add(writer, key, value)
            for _, each in laid:
                kind = gguf.GGMLQuantizationType[each.kind]
                writer.add_tensor_info(each.name, each.shape, np.dtype(each.dtype), each.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, each in laid:
                values, lost = each.make()
                writer.write_tensor_data(values)
                if name in packed:
                    report[name] = {
                        "spec": str(packed[name].spec),
                        "shape": list(packed[name].shape),
                        "container": each.kind,
                        "bytes": each.nbytes,
                        "error": lost,
                    }
        finally:
            writer.close()
        return report, sum(padded(each.nbytes) for _, each in laid)

    def _laid(self) -> Iterator[tuple[str, Laid]]:
        """The model's name, "" for what only llama.cpp has, and the tensor."""
        frequencies = frequencies_of(self.config)
        if frequencies is not None:
            yield "", _dense(FREQUENCIES, "F32", frequencies)
        for name, value in self.artifact.state().items():
            yield name, self._one(name, value)

    def _one(self, name: str, value: Tensor) -> Laid:
        there, rows = self.names[name], value.shape[0]
        order = order_of(name, rows, self.config, self.architecture)
        if isinstance(value, KbitTensor):
            packed = value.packed
            kind = KINDS[packed.spec]
            shape = (*packed.planes.shape[:-1], kind.row_bytes(packed.in_features))
            return Laid(there, kind.name, shape, np.uint8, partial(_blocks, packed, order))
        dense = value if order is None else value[order]
        if dense.dim() == 1:
            return _dense(there, "F32", vector_of(name, dense, self.architecture))
        if dense.dtype == torch.bfloat16:
            return _dense(there, "BF16", dense.contiguous().view(torch.uint8))
        return _dense(there, "F16", dense.half())


def _blocks(packed: Packed, order: Tensor | None) -> tuple[Array, float]:
    blocks, lost = blocks_of(packed)
    return (blocks if order is None else np.ascontiguousarray(blocks[order.numpy()])), lost


def _dense(name: str, kind: str, values: Tensor) -> Laid:
    array = np.ascontiguousarray(values.numpy())
    return Laid(name, kind, array.shape, array.dtype.type, lambda: (array, 0.0))


def _add(writer: Any, key: str, value: Any) -> None:
    """One value of the header, of the type that Python has it in."""
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)
