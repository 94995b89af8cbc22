"""Adam, AdamW, SGD with momentum, Lion and StableAdamW on block-wise states.

The papers: *8-bit Optimizers via Block-wise Quantization* (states), QLoRA (paged states), *Symbolic Discovery
of Optimization Algorithms* (Lion), *Stable and low-precision training for large-scale vision-language models*
(StableAdamW). Every class takes parameters and options as its namesake in torch does, and these:

    bits      of a state: 8, 4, or 32 (plain float32)
    block     numbers that share a scale: even, up to 4096
    min_size  parameters of fewer numbers keep plain float32 states: norms and biases, by default
    paged     keep states in a file that is mapped a piece at a time: True for one in kbitc's cache folder, or
              a folder

A parameter with an attribute ``optim_bits`` keeps states of so many bits, whatever the optimizer's
(`kbitc.nn.StableEmbedding` sets it to 32).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from kbitc.errors import UsageError
from kbitc.formats.state_levels import BLOCK
from kbitc.kernels.training import WHOLE, Rule, StepNumbers
from kbitc.optim.blockwise import BlockwiseOptimizer

MIN_SIZE = 4096


class Adam8bit(BlockwiseOptimizer):
    """Adam (1412.6980) with an L2 penalty; see `torch.optim.Adam`, without ``amsgrad``.

    Two states: 2.03 bytes a parameter at 8 bits, 1.03 at 4, in blocks of 256.

    Raises:
        UsageError: an option out of range, or a parameter that it cannot move.
    """

    RULE: ClassVar[Rule] = Rule.ADAM
    FIELDS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    IS_DECOUPLED: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        bits: int = 8,
        block: int = BLOCK,
        min_size: int = MIN_SIZE,
        paged: bool | str | Path = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, options, bits=bits, block=block, min_size=min_size, paged=paged)

    def numbers(self, group: dict[str, Any], count: int, clip: float = 1.0) -> StepNumbers:
        """See `BlockwiseOptimizer.numbers`."""
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]) / clip, group["weight_decay"]
        return StepNumbers(
            sign=-1.0 if group["maximize"] else 1.0,
            l2=0.0 if self.IS_DECOUPLED else decay,
            decay=1.0 - lr * decay if self.IS_DECOUPLED else 1.0,
            rate=lr / (1.0 - beta1**count),
            a=beta1,
            a_rest=1.0 - beta1,
            b=beta2,
            b_rest=1.0 - beta2,
            root=1.0 / math.sqrt(1.0 - beta2**count),
            eps=group["eps"],
        )


class AdamW8bit(Adam8bit):
    """Adam with weight decay of its own (1711.05101); see `torch.optim.AdamW` and `Adam8bit`.

    Example:
        >>> import torch, kbitc.optim
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = kbitc.optim.AdamW8bit(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].layout.bits
        8
    """

    IS_DECOUPLED: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class StableAdamW(AdamW8bit):
    """AdamW whose step of a tensor is divided by the size of its update, where that is above 1.

    The size is the root mean square of g / sqrt(v), as in Adafactor (2304.13013, algorithm 2): after an
    under-estimated second moment no step is too large. States are float32 unless ``bits`` says otherwise.
    """

    IS_CLIPPED: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = WHOLE,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bits=bits, **options)


class SGD8bit(BlockwiseOptimizer):
    """SGD with momentum and an L2 penalty; see `torch.optim.SGD`.

    One state: 1.02 bytes a parameter at 8 bits.

    Raises:
        UsageError: an option out of range, no momentum, or a parameter that it cannot move.
    """

    RULE: ClassVar[Rule] = Rule.MOMENTUM
    FIELDS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        bits: int = 8,
        block: int = BLOCK,
        min_size: int = MIN_SIZE,
        paged: bool | str | Path = False,
    ) -> None:
        if momentum <= 0.0:
            raise UsageError(
                f"momentum is {momentum}: without momentum SGD has no states; take torch.optim.SGD"
            )
        if nesterov and dampening != 0.0:
            raise UsageError(f"Nesterov momentum takes no dampening, which is {dampening}")
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, options, bits=bits, block=block, min_size=min_size, paged=paged)

    def numbers(self, group: dict[str, Any], count: int, clip: float = 1.0) -> StepNumbers:
        """See `BlockwiseOptimizer.numbers`. The first gradient is taken whole, as torch does."""
        return StepNumbers(
            sign=-1.0 if group["maximize"] else 1.0,
            l2=group["weight_decay"],
            rate=float(group["lr"]) / clip,
            a=group["momentum"],
            a_rest=1.0 if count == 1 else 1.0 - group["dampening"],
            b=1.0 if group["nesterov"] else 0.0,
        )


class Lion8bit(BlockwiseOptimizer):
    """Lion (2302.06675): steps of one size, along the sign of a running mean; weight decay of its own.

    One state: 1.02 bytes a parameter at 8 bits. Rates are a third to a tenth of Adam's.

    Raises:
        UsageError: an option out of range, or a parameter that it cannot move.
    """

    RULE: ClassVar[Rule] = Rule.LION
    FIELDS: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        bits: int = 8,
        block: int = BLOCK,
        min_size: int = MIN_SIZE,
        paged: bool | str | Path = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, bits=bits, block=block, min_size=min_size, paged=paged)

    def numbers(self, group: dict[str, Any], count: int, clip: float = 1.0) -> StepNumbers:
        """See `BlockwiseOptimizer.numbers`."""
        del count
        (beta1, beta2), lr = group["betas"], float(group["lr"]) / clip
        return StepNumbers(
            sign=-1.0 if group["maximize"] else 1.0,
            decay=1.0 - lr * group["weight_decay"],
            rate=lr,
            a=beta1,
            a_rest=1.0 - beta1,
            b=beta2,
            b_rest=1.0 - beta2,
        )
