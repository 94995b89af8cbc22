"""What a packed weight cannot do, and what to do instead: the words of the errors.

The one thing to know: nothing is dequantized, trained or written in silence; what tries meets one of these.
"""

from __future__ import annotations

from typing import Any

from kbitc.errors import UsageError

DENSE = (
    "call kbitc.dequantized(model), which makes all weights dense, or leave this weight alone (spec fp16) "
    "when compiling"
)
CHANGED = (
    "a packed weight is frozen: its values cannot be changed in place. To merge an adapter, resize "
    f"embeddings or edit weights, {DENSE}"
)
TRAINED = (
    "a packed weight is frozen and never gets a gradient. Train adapters over it, or leave this weight alone "
    "(spec fp16) when compiling; kbitc.dequantized(model) makes all weights dense. PEFT's DoRA asks for one "
    "of embeddings and of Conv1D: take LoRA or VeRA there"
)
STORED = (
    "a packed weight is several tensors and has no storage of its own. To write a model, use "
    "kbitc.save(model, folder) or model.save_pretrained(folder), and for a state_dict torch.save; to keep "
    "weights off a device, place whole modules on the CPU: packed weights cannot be left on a disk"
)
SHARDED = (
    "a packed weight is not cut or gathered. FSDP and tensor parallelism take models whose weights are "
    "dense; DistributedDataParallel takes packed ones: every process loads the same artifact"
)
ASKED_BY_SHARDING = {
    "split",
    "chunk",
    "split_with_sizes",
    "new_zeros",
    "new_empty",
    "empty_like",
    "as_strided",
    "view",
    "cat",
}


def refusal(func: Any) -> NotImplementedError:
    """The error for an operation of aten that a packed weight does not have."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    if name.endswith("_") and not name.endswith("__"):
        why = CHANGED
    elif name in ASKED_BY_SHARDING:
        why = f"{SHARDED}. For anything else {DENSE}"
    else:
        why = (
            "kbitc packs weights that are read by matmuls of any kind, through views, slices, casts and "
            "scales, and by embeddings; for anything else, as merging adapters and resizing embeddings are, "
            f"{DENSE}"
        )
    return NotImplementedError(f"{func} is not defined on a packed weight. {why}")


def no_storage(*_: object, **__: object) -> Any:
    """In the place of what would give the bytes of a dense weight.

    Raises:
        UsageError: always.
    """
    raise UsageError(STORED)


def check_frozen(requires_grad: object) -> None:
    """Refuse to mark a packed weight as one that is trained.

    Raises:
        UsageError: it would be.
    """
    if requires_grad:
        raise UsageError(TRAINED)
