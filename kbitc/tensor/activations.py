"""Which linears of a packed model compute with int8 activations: LLM.int8() as a lowering choice.

The one thing to know: it is a mark on the packed weights, which then call ``kbit::linear_int8``; nothing is
repacked, the model's code and graph are the same, and the outlier features were split off when it was packed.
"""

from __future__ import annotations

from torch import nn

from kbitc.errors import UsageError, did_you_mean
from kbitc.formats.packed import Packed
from kbitc.tensor.kbit_tensor import KbitTensor

ACTIVATIONS = ("float", "int8")


def use_activations(model: nn.Module, activations: str) -> dict[str, str]:
    """Let the packed linears of a model take their input as floats or as int8.

    Args:
        model: with packed weights; changed in place.
        activations: "int8" rounds each row of the input to 8 bits, its outlier features apart, and multiplies
            in integers; "float" does not.

    Returns:
        The reason for each packed weight that goes on with floats although int8 was asked for, by name.

    Raises:
        UsageError: an unknown choice, or no weight of the model can take int8.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(did_you_mean("kind of activations", activations, ACTIVATIONS))
    left: dict[str, str] = {}
    marked: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, weight in module._parameters.items():
            if not isinstance(weight, KbitTensor):
                continue
            reason = obstacle(weight.packed) if activations == "int8" else None
            if reason is not None:
                left[f"{path}.{leaf}".lstrip(".")] = reason
                continue
            if id(weight) not in marked:
                chosen = weight._like(weight.packed)
                chosen.activations = activations
                marked[id(weight)] = nn.Parameter(chosen, requires_grad=False)
            module._parameters[leaf] = marked[id(weight)]
    if not marked and activations == "int8":
        raise UsageError(
            "no packed weight of this model can meet int8 activations: that takes the data type int8 with "
            "one scale a row, for example --spec int8:65536, or int8:65536+out1% with outlier features"
        )
    return left


def used_activations(model: nn.Module) -> str:
    """What the packed linears of a model take: "int8" if any does, else "float"."""
    weights = (parameter for parameter in model.parameters() if isinstance(parameter, KbitTensor))
    return "int8" if any(weight.activations == "int8" for weight in weights) else "float"


def obstacle(packed: Packed) -> str | None:
    """Why a weight cannot meet int8 activations; None if it can."""
    if len(packed.shape) != 2:
        return "experts have no int8 matmul"
    if packed.spec.family != "int" or packed.spec.bits != 8 or packed.zeros is not None:
        return f"its format is {packed.spec}, not int8"
    if packed.scales.shape[-1] != 1:
        return f"{packed.spec} has {packed.scales.shape[-1]} scales a row, not one"
    return None
