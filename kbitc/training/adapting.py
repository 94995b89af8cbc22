"""A packed model made ready to have adapters trained over it.

The one thing to know: the packed weights stay as they are and are never trained; what is not packed becomes
float32, so that the model computes in float32 and sums over many layers and steps do not drift.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from kbitc.errors import UsageError
from kbitc.tensor.kbit_tensor import KbitTensor
from kbitc.tensor.unpacking import read_as

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def prepare_for_training(model: AnyModule, *, checkpointing: bool = True) -> AnyModule:
    """Freeze a packed model and let gradients flow through it, before PEFT puts adapters into it.

    Args:
        model: with packed weights; changed in place.
        checkpointing: of a model of transformers: keep the inputs of layers alone and compute their insides
            again on the way back, which takes a third more time and much less memory.

    Returns:
        The model, which computes in float32: norms, biases and all else that is not packed are cast, packed
        weights stay as they are.

    Raises:
        UsageError: nothing in it is packed.
    """
    if not any(isinstance(weight, KbitTensor) for weight in model.parameters()):
        raise UsageError("nothing in this model is packed; compile it first with kbitc.compile")
    model.requires_grad_(requires_grad=False)
    widen(model)
    given: Any = model
    if checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        given.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        given.enable_input_require_grads()
    return model


def widen(model: nn.Module) -> None:
    """Let a model compute in float32: 16-bit tensors become float32, packed ones are read as it.

    Args:
        model: changed in place; tied weights stay tied, and nothing that is packed is copied.
    """
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, weight in module._parameters.items():
            if weight is None or weight.dtype not in (torch.float16, torch.bfloat16):
                continue
            if id(weight) not in wide:
                wide[id(weight)] = _as_float32(weight)
            module._parameters[leaf] = wide[id(weight)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                module._buffers[leaf] = buffer.float()


def _as_float32(weight: nn.Parameter) -> nn.Parameter:
    values = weight.detach()
    other = read_as(values, torch.float32) if isinstance(values, KbitTensor) else values.float()
    return nn.Parameter(other, requires_grad=weight.requires_grad)
