"""What the optimizers of this room refuse, and how they say it: the first thing that does not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats.state_levels import BITS, BLOCK_MOST
from kbitc.kernels.training import WHOLE
from kbitc.optim.moments import MARK, Held, Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAID = ("bits", "block", "min_size")
"""The options that say how states lie in memory."""

SHARDED = "{name} is sharded by {by}, and blocks of states do not follow its shards; take one of torch.optim"


def check_options(group: dict[str, Any]) -> None:
    """Raises a UsageError for the first option of a group that is out of range."""
    widths = (*BITS, WHOLE)
    _expect(group["bits"] in widths, group, "bits", f"one of {', '.join(map(str, widths))}")
    block = group["block"]
    is_block = isinstance(block, int) and 2 <= block <= BLOCK_MOST and block % 2 == 0
    _expect(is_block, group, "block", f"an even number from 2 to {BLOCK_MOST}")
    for option in ("lr", "eps", "weight_decay", "min_size", "momentum", "dampening"):
        if option in group:
            _expect(float(group[option]) >= 0.0, group, option, "not below 0")
    if "betas" in group:
        _expect(all(0.0 <= beta < 1.0 for beta in group["betas"]), group, "betas", "from 0 to below 1")


def _expect(is_right: bool, group: dict[str, Any], option: str, wanted: str) -> None:
    if not is_right:
        raise UsageError(f"{option} is {group[option]}; expected {wanted}")


def check_parameter(param: Tensor, name: str) -> None:
    """Raises a UsageError unless this is a plain float tensor, whole on this process."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(param, distributed.DTensor):
        raise UsageError(SHARDED.format(name=name, by="FSDP2 or tensor parallelism (a DTensor)"))
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        raise UsageError(SHARDED.format(name=name, by="FSDP"))
    plain = param.detach()
    if type(plain) is not Tensor or plain.layout is not torch.strided:
        raise UsageError(f"{name} is a {type(plain).__name__}, which no optimizer can move; freeze it")
    if param.dtype not in DTYPES:
        raise UsageError(f"{name} is {param.dtype}; expected float32, bfloat16 or float16")
    bits = getattr(param, MARK, None)
    if bits is not None and bits not in (*BITS, WHOLE):
        raise UsageError(f"{name} has optim_bits {bits}; expected 4, 8 or 32")


def check_gradient(param: Tensor, grad: Tensor, name: str) -> None:
    """Raises a UsageError for a gradient that is sparse, or does not fit its parameter."""
    if grad.layout is not torch.strided:
        raise UsageError(
            f"{name} has a sparse gradient, of which block-wise states know nothing; make the embedding with "
            "sparse=False, or give its parameters to torch.optim.SparseAdam"
        )
    if grad.shape != param.shape or grad.dtype not in DTYPES:
        raise UsageError(
            f"{name} has a gradient of {grad.dtype} {tuple(grad.shape)}; expected a float one of "
            f"{tuple(param.shape)}"
        )


def check_groups(own: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    """Raises a UsageError where saved groups are of other parameters, or were kept in another layout."""
    sizes, others = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != others:
        raise UsageError(f"the saved state has groups of {others} parameters, and this optimizer of {sizes}")
    for index, (group, other) in enumerate(zip(own, saved, strict=True)):
        for option in LAID:
            if option not in other:
                raise UsageError(
                    f"the saved state's group {index} says no {option}: it is another optimizer's, whose "
                    "states are no block-wise codes"
                )
            if other[option] != group[option]:
                raise UsageError(
                    f"the saved state's group {index} has {option}={other[option]}, and this optimizer "
                    f"{group[option]}; make it with {option}={other[option]}"
                )


def check_step(state: dict[str, Any], fields: set[str], name: str, optimizer: str) -> None:
    """Raises a UsageError unless a saved state has just these fields."""
    if set(state) != fields:
        raise UsageError(
            f"{name}: the saved state holds {', '.join(sorted(state))}; {optimizer} keeps "
            f"{', '.join(sorted(fields))}"
        )


def check_moment(layout: Layout, held: Held, name: str) -> None:
    """Raises a UsageError unless saved tensors have the dtypes and sizes of a layout."""
    wanted = ((held.codes, layout.dtype, layout.codes), (held.scales, torch.float32, layout.scales))
    for tensor, dtype, count in wanted:
        if tensor.dtype != dtype or tensor.shape != (count,):
            raise UsageError(
                f"{name} is saved as {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} ({count},): "
                f"{layout.count} numbers of {layout.bits} bits in blocks of {layout.block}"
            )
