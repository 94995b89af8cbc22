"""A Hugging Face folder: config.json and safetensors, whole or in shards.

The one thing to know: names go through transformers' own conversion rules, so that a tensor that the
model keeps merged (Mixtral's experts) is merged from the source's parts when, and only when, it is
read. Every read opens the file anew: pages of a memory map count as resident until it is closed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kbitc.checkpoint.base import TensorInfo, build_skeleton, stored_names
from kbitc.errors import SourceError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Everything that a tokenizer, processor or generate() may want; weights and code stay behind.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab*", "merges.txt", "*.model", "spiece*", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "sentence_bert_config.json", "modules.json",
)  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass
class _Recipe:
    """How one tensor of the model comes from the source's tensors."""

    target: str  # the first of the converter's targets
    converter: Any = None  # a transformers WeightConverter, or None for a plain copy
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, source name)


class HfFolder:
    """Reader of one folder.

    Args:
        folder: with config.json.
        label: how messages call it.

    Raises:
        SourceError: no config, no safetensors, a damaged file, or a tensor that the model needs is
            missing or of another shape.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self.folder = folder
        self.config_json = _read_config(folder, label)
        self.files = _weight_files(folder, label)
        self.headers = {name: entry for file in self.files for name, entry in _header(file, label).items()}
        self._model = self.skeleton()
        self._names = stored_names(self._model)
        self._recipes = self._match()
        self._check()

    def skeleton(self) -> nn.Module:
        """See :class:`Checkpoint`."""
        return build_skeleton(read_transformers_config(self.folder, self.label), self.label)

    @functools.cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        shapes = {name: tuple(t.shape) for name, t in self._model.state_dict(keep_vars=True).items()}
        infos = {}
        for name, recipe in self._recipes.items():
            entries = [self.headers[source] for _, source in recipe.sources]
            dtype = entries[0].dtype
            infos[name] = TensorInfo(shapes[name], dtype, math.prod(shapes[name]) * dtype.itemsize)
        return infos

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See :class:`Checkpoint`."""
        return self._infos

    def ignored(self) -> list[str]:
        """Tensors of the source that the model does not have."""
        used = {source for recipe in self._recipes.values() for _, source in recipe.sources}
        return sorted(set(self.headers) - used)

    def read(self, name: str) -> Tensor:
        """See :class:`Checkpoint`."""
        recipe = self._recipes[name]
        if recipe.converter is None:
            return self._load(recipe.sources[0][1])
        mapping = copy.deepcopy(recipe.converter)
        for pattern, source in recipe.sources:
            mapping.add_tensor(recipe.target, source, pattern, functools.partial(self._load, source))
        realized = mapping.convert(recipe.target, model=self._model, config=self._model.config)
        found = realized[name]
        tensor: Tensor = found[0] if isinstance(found, list) else found
        if tuple(tensor.shape) != self._infos[name].shape:
            raise SourceError(
                f"{self.label}: '{name}' is {tuple(tensor.shape)} in the files, but the model of "
                f"config.json has {self._infos[name].shape}; config and weights do not belong together"
            )
        return tensor

    def _load(self, source: str) -> Tensor:
        try:
            with safe_open(self.headers[source].file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(source)
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{self.headers[source].file}: '{source}' cannot be read: {error}") from error
        return tensor

    def fingerprint(self) -> str:
        """See :class:`Checkpoint`."""
        parts = [(self.folder / "config.json").read_bytes()]
        for file in self.files:
            stat = file.stat()
            parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return hashlib.sha256(b"\n".join(parts)).hexdigest()

    def save_companions(self, folder: Path) -> None:
        """See :class:`Checkpoint`."""
        for pattern in COMPANIONS:
            for path in sorted(self.folder.glob(pattern)):
                if path.is_file() and path.suffix not in (*PICKLES, ".safetensors", ".py"):
                    shutil.copyfile(path, folder / path.name)

    def _match(self) -> dict[str, _Recipe]:
        """A recipe for every tensor of the model, by its first name."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model: Any = self._model
        state = model.state_dict()
        rules = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = getattr(model, "base_model_prefix", None)
        recipes: dict[str, _Recipe] = {}
        for source in sorted(self.headers, key=_natural):
            name, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if name not in state and source in state:
                name, pattern = source, None
            if name not in state and pattern is None:
                name, pattern = rename_source_key(source, [], [], prefix, state)
            if name not in state:
                continue
            if pattern is None:
                recipes[name] = _Recipe(name, sources=[(source, source)])
                continue
            recipe = recipes.setdefault(name, _Recipe(name, by_pattern[pattern]))
            recipe.sources.append((pattern, source))
        for recipe in list(recipes.values()):
            if recipe.converter is not None:
                targets = recipe.converter.target_patterns
                for other in targets[1:]:
                    recipes[recipe.target.replace(targets[0], other)] = recipe
        found = {}
        for first, aliases in self._names.items():
            provider = next((alias for alias in aliases if alias in recipes), None)
            if provider is not None:
                found[first] = recipes[provider]
        return found

    def _check(self) -> None:
        missing = [name for name in self._names if name not in self._recipes]
        if missing:
            raise SourceError(
                f"{self.label}: the files lack {len(missing)} tensors of {type(self._model).__name__}, the "
                f"first is '{missing[0]}'; a shard may be missing, or config.json is of another model"
            )
        for name, recipe in self._recipes.items():
            if recipe.converter is None:
                entry = self.headers[recipe.sources[0][1]]
                if entry.shape != self._infos[name].shape:
                    raise SourceError(
                        f"{self.label}: '{name}' is {entry.shape} in {entry.file.name}, but the model of "
                        f"config.json has {self._infos[name].shape}; config and weights do not match"
                    )

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def skeleton_of(folder: Path) -> nn.Module:
    """The skeleton of any folder with a config.json, an artifact too."""
    return build_skeleton(read_transformers_config(folder, str(folder)), str(folder))


def read_transformers_config(folder: Path, label: str) -> Any:
    """The folder's config object, without its quantization entry.

    Raises:
        SourceError: transformers does not know the model type, or the file is damaged.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"{label}: transformers cannot read config.json: {str(error).splitlines()[0]}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(p.name for p in folder.iterdir())
        hint = "the folder is empty" if not inside else f"it holds {', '.join(inside[:4])}"
        raise SourceError(
            f"{label}: no config.json ({hint}); give a Hugging Face model folder with config.json and "
            "*.safetensors"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: damaged: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path}: damaged: not a JSON object")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "kbit":
        raise SourceError(f"{label}: is compiled already; compile the model that it was made from")
    if method is not None:
        raise SourceError(
            f"{label}: is quantized already, by '{method}'; compile the 16-bit model that it was made from"
        )
    return config


def _weight_files(folder: Path, label: str) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SourceError(f"{index}: damaged: {error!r}; download the model again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SourceError(
                f"{label}: {len(missing)} of {len(names)} shards are missing, the first is '{missing[0]}'; "
                "download the model again"
            )
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise SourceError(pickle_message(label, pickles[0]))
    raise SourceError(f"{label}: holds config.json but no *.safetensors; download the weights too")


def pickle_message(label: str, file: str) -> str:
    """Why a pickled checkpoint is refused, and what to do."""
    return (
        f"{label}: its weights are pickled ({file}), and unpickling runs code from the file, so kbitc does "
        "not read them. Convert once, where you trust the file: load it with "
        "AutoModel.from_pretrained(...) and call save_pretrained(folder), which writes safetensors"
    )


def _header(file: Path, label: str) -> dict[str, _Entry]:
    try:
        with safe_open(file, framework="pt") as handle:
            entries = {}
            for name in handle.keys():  # noqa: SIM118  # not a dict
                part = handle.get_slice(name)
                entries[name] = _Entry(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
            return entries
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{label}: {file.name} is truncated or damaged ({error}); download it again"
        ) from error
    except KeyError as error:
        raise SourceError(
            f"{label}: {file.name} holds tensors of dtype {error}, which kbitc cannot read"
        ) from error


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts expert 2 before expert 10: merged tensors are stacked in this order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
