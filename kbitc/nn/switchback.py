"""`SwitchBackLinear`, of *Stable and low-precision training for large-scale vision-language models*.

The one thing to know: of the three products of a linear layer two are int8, of the output and of the input's
gradient. The third sums over the batch, where rounding errors would add up, and stays at 16 or 32 bits.

    Y  = (scale of each row of X) (scale of W) Q(X) Q(W).T + b
    dX = (scale of each row of dY) (scale of W) Q(dY) Q(W)
    dW = dY.T X
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kbitc.errors import UsageError
from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.packed import Operands
from kbitc.formats.spec import parse
from kbitc.kernels import training_ops  # noqa: F401  # defines round_tensor

CODEBOOK = shared_codebook(parse("int8:64"))  # the levels of every block size
FEATURES_MOST = 133000
"""Whose products an int32 can sum."""


class SwitchBackLinear(nn.Linear):
    """A linear layer that is trained on int8 products; its parameters are those of `torch.nn.Linear`.

    Takes ``(..., in_features)`` of float32, bfloat16 or float16 and gives ``(..., out_features)`` of the same
    dtype, or of autocast's. The weight's own values are never changed: it is rounded in every forward pass
    under one scale, while gradients and the optimizer see it whole.

    Raises:
        UsageError: more features than int8 products can be summed over.

    Example:
        >>> layer = SwitchBackLinear(64, 32)
        >>> layer(torch.ones(2, 64)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([32, 64])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        if max(in_features, out_features) > FEATURES_MOST:
            raise UsageError(
                f"a layer of {in_features} to {out_features} features: int8 products are summed over at most "
                f"{FEATURES_MOST}; take torch.nn.Linear"
            )
        super().__init__(in_features, out_features, bias, **options)

    @classmethod
    def of(cls, linear: nn.Linear) -> SwitchBackLinear:
        """A layer that takes over the parameters of another."""
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name
        """``(..., in_features)`` to ``(..., out_features)``."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))  # noqa: A001
        product: Tensor = _SwitchBack.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


class _SwitchBack(torch.autograd.Function):
    """x ``(..., in)``, weight ``(out, in)`` and bias ``(out,)`` or None to ``(..., out)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        codes, turned, scale = torch.ops.kbit.round_tensor(weight.detach())
        ctx.save_for_backward(x, turned, scale)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        product: Tensor = torch.ops.kbit.linear_int8(x, *_operands(codes, scale, x.shape[-1]), bias)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, turned, scale = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            operands = _operands(turned, scale, grad.shape[-1])
            grad_x = torch.ops.kbit.linear_int8(grad.contiguous(), *operands, None)
        if wants_weight:
            grad_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if wants_bias:
            grad_bias = rows.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias


def _operands(codes: Tensor, scale: Tensor, features: int) -> Operands:
    """Codes of ``round_tensor`` as a packed weight: one block a row, all of one scale."""
    return Operands(
        planes=codes,
        scales=scale.expand(codes.shape[0], 1).contiguous(),
        codebook=CODEBOOK.to(codes.device),
        zeros=None,
        scale_codebook=None,
        scale_absmax=None,
        scale_mean=None,
        outlier_values=None,
        outlier_index=None,
        in_features=features,
        bits=8,
        block=max(1, features),
    )
