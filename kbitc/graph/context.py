"""What a program carries beside the model: the source's data, what to measure on, and who hears of progress.

The one thing to know: a pass takes what it needs from here, so that nobody has to know which pass needs what.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from kbitc.system.work import IN_PROCESS, Engine

T = TypeVar("T")

ReadTensor: TypeAlias = Callable[[str], Tensor]
"""Reads one tensor by its name in the model."""

Progress: TypeAlias = Callable[[str, int, int], object]
"""``(what, done, all)``: a phase or a tensor's name, and how far it is, in steps or bytes; 0 of 0 where that
cannot be said."""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that nobody hears."""
    del what, done, total


class Calibration(Protocol):
    """Inputs to measure on, and the model to run them through: `kbitc.compiler.calibrator.Calibrator`."""

    @property
    def label(self) -> str:
        """How reports call the text."""
        ...

    @property
    def is_text(self) -> bool:
        """Whether inputs are text; otherwise they are drawn."""
        ...

    def feeds(self, count: int | None = None) -> list[dict[str, Any]]:
        """Keyword inputs, all of the same shapes: ``count`` at most, or as many as measuring takes.

        Of text that the model samples, fewer are the first of more.
        """
        ...

    def skeleton(self) -> nn.Module:
        """The model in float32 on the meta device, to be traced on one of the feeds."""
        ...

    def loss(self, feed: Mapping[str, Any], outputs: Sequence[Any], seed: int) -> Tensor:
        """What to take gradients of."""
        ...

    def read(self, name: str) -> Tensor:
        """A parameter or buffer, those included that no checkpoint holds."""
        ...

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made for a key, or was made for it before in this run."""
        ...

    def remembered(
        self, measure: Callable[[], Mapping[str, Tensor]], options: str = ""
    ) -> Mapping[str, Tensor]:
        """What an earlier run measured on the same model and text, or what ``measure`` gives, kept."""
        ...


@dataclass(frozen=True)
class Context:
    """What surrounds a program.

    Attributes:
        read: one tensor of the source by name; None for a program without a source.
        calibration: inputs to measure on; None where there are none.
        on_progress: told of long work.
        dtypes: of the source's tensors, by name, where they are known without reading.
        engine: does what each tensor asks for by itself.
    """

    read: ReadTensor | None = None
    calibration: Calibration | None = None
    on_progress: Progress = silent
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    engine: Engine = IN_PROCESS
