"""A 16-bit model in which some tensors are float32, made to run.

The one thing to know: a tensor is float32 because 16 bits would lose it. A layer that holds one computes
in float32 and gives back the model's dtype, so that nothing after it sees the difference; unless that dtype
holds nothing of the tensor at all, when activations stay in float32. What the model itself keeps in float32,
its own code already handles.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kbitc.checkpoint.float32_names import float32_names
from kbitc.tensor.kbit_tensor import KbitTensor


def run_in_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Add hooks to the modules that hold float32 tensors of their own, so that they take and give ``dtype``.

    Args:
        model: loaded; other unpacked tensors of such layers become float32 too.
        dtype: of activations; nothing happens unless it has 16 bits.
    """
    if dtype.itemsize != 2:
        return
    known = float32_names(model, dtype)
    holders = {module: _wide_floats(module, path, known) for path, module in model.named_modules()}
    holders = {module: wide for module, wide in holders.items() if wide}
    if any(_is_lost(dtype, tensor) for wide in holders.values() for tensor in wide):
        for layer in model.modules():
            if _is_torch_s(layer) and _own_floats(layer):
                _compute_wide(layer)
        return
    for module in holders:
        if any(True for _ in module.children()):
            for layer in module.modules():
                _take_own_dtype(layer)
        else:
            _compute_wide(module)
        module.register_forward_hook(partial(_narrow, dtype))


def _wide_floats(module: nn.Module, path: str, known: Container[str]) -> list[Tensor]:
    """Float32 tensors of a module that its code does not expect."""
    # A model's own code reads its buffers as they are.
    expected = () if _is_torch_s(module) else module._buffers
    return [
        tensor
        for name, tensor in _own_floats(module).items()
        if tensor.dtype.itemsize > 2 and name not in expected and f"{path}.{name}".lstrip(".") not in known
    ]


def _is_lost(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a dtype has no place for a tensor's values: all are rounded to zero, or to infinity."""
    size = tensor.abs().amax() if tensor.numel() else tensor.new_ones(())
    return bool(size > 0) and bool(size.isfinite()) and (size.to(dtype) in (0, torch.inf))


def _compute_wide(layer: nn.Module) -> None:
    for name, tensor in _own_floats(layer).items():
        if tensor.dtype.itemsize == 2:
            _set(layer, name, tensor.float())
    layer.register_forward_pre_hook(_widen, with_kwargs=True)


def _own_floats(module: nn.Module) -> dict[str, Tensor]:
    """The unpacked floats that a module holds itself and that are stored."""
    tensors: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor is not None
        and not isinstance(tensor, KbitTensor)
        and tensor.is_floating_point()
        and tensor.dtype.itemsize > 1
        and name not in module._non_persistent_buffers_set
    }


def _is_torch_s(module: nn.Module) -> bool:
    """Whether a layer is one of torch's, which refuse an input of another dtype than their tensors."""
    return type(module).__module__.startswith("torch.nn.")


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value
    else:
        old = module._parameters[name]
        assert old is not None
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


def _take_own_dtype(layer: nn.Module) -> None:
    """Let a dense 16-bit layer of torch's take what its surroundings computed in float32."""
    dtypes = {tensor.dtype for tensor in _own_floats(layer).values()}
    if _is_torch_s(layer) and len(dtypes) == 1 and (dtype := dtypes.pop()).itemsize == 2:
        layer.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor

    return pytree.tree_map_only(Tensor, cast, values)


# Hooks, of this module so that a model with them can be copied and pickled.


def _cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    del module
    return _cast(dtype, args), _cast(dtype, kwargs)


def _widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _cast_inputs(torch.float32, module, args, kwargs)


def _narrow(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    del module, args
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, output)
