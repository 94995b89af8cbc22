"""A model whose packed weights are buffers of plain tensors while it is traced.

The one thing to know: torch.export lifts the buffers as inputs of the graph, each packed tensor once
however many weights share it; their data is never copied, and the model is as before afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kbitc.tensor.kbit_tensor import KbitTensor


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share that are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class LiftedModel(nn.Module):
    """A model without its packed weights, and their tensors as buffers.

    Attributes:
        model: as given.
        places: each packed parameter's module, leaf name, weight, and its buffers by field.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.places: list[tuple[nn.Module, str, KbitTensor, dict[str, str]]] = []
        known: dict[tuple[Any, ...], str] = {}
        for module in model.modules():
            for leaf, weight in module._parameters.items():
                if not isinstance(weight, KbitTensor):
                    continue
                names = {}
                for field, tensor in weight.packed.tensors().items():
                    key = place_of(tensor)
                    if key not in known:
                        known[key] = f"packed_{len(known)}"
                        self.register_buffer(known[key], tensor, persistent=False)
                    names[field] = known[key]
                self.places.append((module, leaf, weight, names))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, by its name there."""
        tensors = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        return {name: tensor.detach() for name, tensor in tensors.items() if type(tensor) is not KbitTensor}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Packed parameters made of the buffers in the model, for one call of it."""
        for module, leaf, weight, names in self.places:
            fields = {field: getattr(self, name) for field, name in names.items()}
            packed = replace(weight.packed, **fields)
            built: Any = weight._like(packed)
            module._parameters[leaf] = built
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        for module, leaf, _, _ in self.places:
            module._parameters[leaf] = None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Packed parameters away from the model, for a while."""
        self._hide()
        try:
            yield
        finally:
            for module, leaf, weight, _ in self.places:
                module._parameters[leaf] = weight  # type: ignore[assignment]  # a parameter it is
