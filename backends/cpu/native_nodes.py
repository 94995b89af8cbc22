"""Torch's operations that native steps have under another name, or need not do at all."""

from __future__ import annotations

from typing import Any

import torch

aten: Any = torch.ops.aten

UNARY = {
    aten.neg.default: "neg",
    aten.square.default: "square",
    aten.rsqrt.default: "rsqrt",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.cos.default: "cos",
    aten.sin.default: "sin",
    aten.exp.default: "exp",
    aten.sqrt.default: "sqrt",
    aten.clone.default: "copy",
}
BINARY = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
}
VIEWS = {
    *(aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor),
    *(
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.select.int,
        aten.expand.default,
        aten.flatten.using_ints,
    ),
    *(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.t.default),
}
SAME = {aten.alias.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default}
CONVERSIONS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
}
