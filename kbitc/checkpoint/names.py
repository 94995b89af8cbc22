"""Names of a model's stored tensors, tied ones together."""

from __future__ import annotations

from torch import Tensor, nn


def stored_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of every parameter and persistent buffer by the first one, in the model's order.

    >>> tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> tied[1].weight = tied[0].weight
    >>> stored_names(tied)
    {'0.weight': ('0.weight', '1.weight')}
    """
    transient = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    names: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for name, first in first_names(model).items():
        if name not in transient:
            names.setdefault(owner.setdefault(first, name), []).append(name)
    return {first: tuple(aliases) for first, aliases in names.items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer to the first name of the same tensor, in the model's order."""
    owner: dict[int, str] = {}
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: owner.setdefault(id(tensor), name) for name, tensor in tensors}


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor), name
    return tensor
