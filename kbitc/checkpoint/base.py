"""What every reader of a source model offers.

The one thing to know: a checkpoint is read one tensor at a time, under the *model's* names; how the
source names, splits or encodes its tensors stays inside the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kbitc.errors import SourceError


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the source: the model's shape, the source's dtype and bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Checkpoint(Protocol):
    """A source model, read lazily. Use as a context manager."""

    label: str

    def skeleton(self) -> nn.Module:
        """The model on the meta device, in eval mode, tied; it holds no weight memory."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every parameter and persistent buffer, tied ones once, by the model's first name."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the source's dtype and the model's shape."""

    def fingerprint(self) -> str:
        """Identity of the source, cheap to take; ``--resume`` compares it."""

    def save_companions(self, folder: Path) -> None:
        """Write config, generation config and tokenizer files beside an artifact."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, *_: object) -> None: ...


def stored_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name to all names, of every parameter and persistent buffer, in the model's order."""
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    first = {id(p): name for name, p in model.named_parameters()}
    grouped = {}
    for key, found in names.items():
        head = first.get(key, found[0])
        grouped[head] = (head, *(name for name in found if name != head))
    return grouped


def build_skeleton(config: Any, label: str) -> nn.Module:
    """A transformers model on the meta device, from its config.

    Raises:
        SourceError: this transformers has no such model, or cannot build it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model_class is None:
        raise SourceError(
            f"{label}: transformers {transformers.__version__} has no model class '{names[0]}'; install "
            "the version that the model was made with (code that ships with a model is not run)"
        )
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config)
    except Exception as error:
        raise SourceError(f"{label}: its config does not build a model: {error}") from error
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model.eval()
