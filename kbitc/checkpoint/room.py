"""How large a model a checkpoint can be of, so that a config that asks for more is refused and not built.

The one thing to know: every parameter needs a tensor of the source, so the bounds are generous and still
end the building of two million layers within a second or two.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kbitc.errors import SourceError

# Tied parameters are made twice; one tensor of a GGUF file may hold hundreds of experts.
ELEMENTS, MORE_ELEMENTS = 8, 2**20
EACH, MORE = 40, 2_000

# What transformers' configs and GGUF files call the number of their modules.
_COUNTS = re.compile(r"(^|_)(n|num)_(\w+_)?(layer|block|expert|stage)s?$|layers$|(block|layer|expert)_count$")


@dataclass(frozen=True)
class Room:
    """What a source holds.

    Attributes:
        tensors: how many.
        elements: of all of them.
    """

    tensors: int
    elements: int

    @staticmethod
    def of(shapes: Iterable[tuple[int, ...]]) -> Room:
        """The room of a source with tensors of such shapes.

        >>> Room.of([(2, 3), (4,)])
        Room(tensors=2, elements=10)
        """
        sizes = [math.prod(shape) for shape in shapes]
        return Room(len(sizes), sum(sizes))

    @property
    def modules(self) -> int:
        """More parameters, or layers, than this are refused."""
        return MORE + EACH * self.tensors

    def check_config(self, config: Mapping[str, Any], label: str) -> None:
        """See that no entry of a config, or of those in it, asks for more modules than there can be.

        Args:
            config: as the file has it, before transformers reads it and makes lists of that length.
            label: of the source.

        Raises:
            SourceError: one does.
        """
        for key, value in config.items():
            if isinstance(value, Mapping):
                self.check_config(value, label)
            elif isinstance(value, int | float) and value > self.modules and _COUNTS.search(key):
                raise SourceError(
                    f"{label}: the config says '{key}': {value}, but the weights are {self.tensors} tensors; "
                    "config and weights do not belong together"
                )

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within, this thread cannot make modules with more parameters than there is room for.

        Raises:
            SourceError: it did.
        """
        thread = threading.get_ident()
        count = elements = 0

        def see(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            nonlocal count, elements
            if parameter is None or threading.get_ident() != thread:
                return
            count, elements = count + 1, elements + parameter.numel()
            if count > self.modules or elements > MORE_ELEMENTS + ELEMENTS * self.elements:
                raise SourceError(
                    f"it asks for more than {count} parameters with {elements} elements (the last is a "
                    f"'{name}'), but the weights are {self.tensors} tensors with {self.elements}; config and "
                    "weights do not belong together"
                )

        handle = nn.modules.module.register_module_parameter_registration_hook(see)
        try:
            yield
        finally:
            handle.remove()
