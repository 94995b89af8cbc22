"""`switchback`: a model's linear layers made `kbitc.nn.SwitchBackLinear`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from kbitc.errors import UsageError
from kbitc.nn.switchback import SwitchBackLinear

Model = TypeVar("Model", bound=nn.Module)


def switchback(model: Model, *, keep: Collection[str] = ("lm_head",)) -> Model:
    """Have a model's linear layers multiply in int8 when it is trained (`kbitc.nn.SwitchBackLinear`).

    Their parameters stay the same objects, tied ones too, so an optimizer that has them goes on. Layers of
    classes derived from `torch.nn.Linear` are left as they are: what they add is not known here.

    Args:
        model: changed in place.
        keep: layers that stay: whole names, or last parts of names. By default what transformers calls the
            output layer: logits of int8 products are coarse.

    Returns:
        The model.

    Raises:
        UsageError: the model has no linear layers to change.
    """
    places = [
        (parent, name, child)
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and name not in keep and f"{prefix}.{name}".removeprefix(".") not in keep
    ]
    if not places:
        kept = ", ".join(keep) or "none"
        raise UsageError(f"the {type(model).__name__} has no torch.nn.Linear to change, apart from {kept}")
    layers = {child: SwitchBackLinear.of(child) for _, _, child in places}  # one that stands twice stays one
    for parent, name, child in places:
        setattr(parent, name, layers[child])
    return model
