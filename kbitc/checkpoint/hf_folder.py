"""A Hugging Face folder: config.json and safetensors, whole or in shards.

The one thing to know: opening reads headers only and checks everything that can be checked without
data: shards, sizes, shapes, missing tensors. After that a read can only fail if the files change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint import companions
from kbitc.checkpoint.base import Checkpoint, TensorInfo
from kbitc.checkpoint.conversion import model_rules
from kbitc.checkpoint.folder_checks import weight_files
from kbitc.checkpoint.linked import Linked, link
from kbitc.checkpoint.room import Room
from kbitc.checkpoint.safetensors_file import Stored, read_header
from kbitc.checkpoint.skeletons import build, load_config, model_classes
from kbitc.errors import SourceError
from kbitc.system.checksums import fingerprint
from kbitc.system.json_file import read_json, read_limited


class HfFolder(Checkpoint):
    """Reader of one folder.

    Args:
        folder: with config.json and safetensors.
        label: what the user typed.

    Raises:
        SourceError: anything about the folder is not as it should be.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder
        self.label = label or str(folder)
        companions.checked(folder / companions.CONFIG, folder)
        self.config = read_json(folder / companions.CONFIG)
        companions.companion_files(folder)  # what is wrong with them is said before the work
        self.files = weight_files(folder, self.config, self.label)
        self.stored = _stored(self.files)
        self._linked = self._link()

    def _link(self) -> Linked:
        """Link to the class of the config; where it names none, to the first guess that fits."""
        sources = {name: stored.info for name, stored in self.stored.items()}
        room = Room.of(info.shape for info in sources.values())
        room.check_config(self.config, self.label)
        config = load_config(self.folder, self.label)
        classes = model_classes(config, self.label)
        dtype = _main_dtype(sources)
        failures = []
        for model_class in classes:
            try:
                model = build(model_class, config, self.label, room, dtype)
                return link(model, sources, model_rules(model), self._read_source, self.label)
            except SourceError as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        tried = ", ".join(model_class.__name__ for model_class in classes)
        raise SourceError(
            f"{self.label}: config.json does not say of which class the model is, and the weights fit "
            f'none of those it may be (tried: {tried}); add its class as "architectures": ["..."]'
        ) from failures[-1]

    def _read_source(self, name: str) -> Tensor:
        return self.stored[name].read()

    def skeleton(self) -> nn.Module:
        """See `Checkpoint`."""
        return self._linked.model

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint`."""
        return self._linked.infos

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._linked.read(name)

    def pieces(self, name: str, rows: int) -> Iterator[Tensor]:
        """See `Checkpoint`."""
        source = self._linked.source_name(name)
        yield from super().pieces(name, rows) if source is None else self.stored[source].pieces(rows)

    def ignored(self) -> list[str]:
        """See `Checkpoint`."""
        return list(self._linked.ignored)

    def fingerprint(self) -> str:
        """See `Checkpoint`."""
        spans: dict[Path, list[tuple[int, int]]] = {file: [] for file in self.files}
        for stored in self.stored.values():
            spans[stored.file].append((stored.offset, stored.info.nbytes))
        return fingerprint(spans, read_limited(self.folder / companions.CONFIG))

    def save_companions(self, folder: Path) -> None:
        """See `Checkpoint`."""
        model: Any = self._linked.model
        config = {**self.config}
        config.setdefault("architectures", [type(model).__name__])
        if self._linked.untied and not model.all_tied_weights_keys:
            config["tie_word_embeddings"] = False  # or loading would look for one tensor of the two
        companions.copy_files(self.folder, folder)
        companions.write_config(config, folder)


def skeleton_of(folder: Path, room: Room) -> nn.Module:
    """The model of a folder's config on the meta device; of an artifact, the one it was made from.

    Raises:
        SourceError: transformers has no such model, or it is larger than there is room for.
    """
    room.check_config(read_json(folder / companions.CONFIG), str(folder))
    config = load_config(folder, str(folder))
    return build(model_classes(config, str(folder))[0], config, str(folder), room)


def _stored(files: list[Path]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in tensors:
                raise SourceError(
                    f"{file}: holds '{name}', which {tensors[name].file.name} holds too; the folder "
                    "mixes the shards of two downloads; remove the ones that do not belong"
                )
            tensors[name] = stored
    return tensors


def _main_dtype(sources: Mapping[str, TensorInfo]) -> torch.dtype:
    """The floating dtype that most bytes are in: the config's entry may not be what was saved."""
    sizes: Counter[torch.dtype] = Counter()
    for info in sources.values():
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32
