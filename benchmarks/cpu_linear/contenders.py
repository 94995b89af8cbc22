"""What is compared in this process: linear layers of torch, and packed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kbitc
from benchmarks.peers import ERROR_ROWS, Sample, copies_of, time_calls
from kbitc.tensor.kbit_tensor import KbitTensor

FP32, BF16 = "torch fp32", "torch bf16"

Timer = Callable[[float], list[Sample]]


@dataclass
class Contender:
    """One row: how to time it, and what is known of it before.

    Attributes:
        timers: by mode, seconds of a slice to its samples.
        facts: other cells of its row.
    """

    name: str
    timers: dict[str, Timer]
    facts: dict[str, Any] = field(default_factory=dict)


def _rotation(calls: Sequence[Callable[[], Any]]) -> dict[str, Timer]:
    return {"cold": partial(time_calls, calls), "warm": partial(time_calls, calls[:1])}


def linears(x: Tensor, weights: Sequence[Tensor]) -> dict[str, Timer]:
    """Timers of F.linear over copies of one weight."""
    return _rotation([partial(F.linear, x, weight) for weight in weights])


def clones(weight: Tensor) -> list[Tensor]:
    """A weight and its copies, as many as no cache holds."""
    return [weight, *(weight.clone() for _ in range(copies_of(weight.nbytes) - 1))]


def dense_contender(x: Tensor, weight: Tensor, dtype: torch.dtype, name: str) -> Contender:
    """F.linear of torch itself."""
    weights = clones(weight.to(dtype))
    return Contender(name, linears(x.to(dtype), weights), {"bytes": weights[0].nbytes})


def int4pack_contender(x: Tensor, weight: Tensor) -> Contender:
    """Int4 weights of torch in groups of 64; all codes are zero here, which costs the same."""
    rows, features = weight.shape
    codes = torch.full((rows, features), 8, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.ones(features // 64, rows, 2, dtype=torch.bfloat16)
    nbytes = packed.nbytes + scales.nbytes
    pairs = [(packed.clone(), scales.clone()) for _ in range(copies_of(nbytes))]
    x = x.to(torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    timers = _rotation([partial(product, x, part, 64, scale) for part, scale in pairs])
    return Contender("torch int4pack :64, bf16 input", timers, {"bytes": nbytes})


def packed_contender(x: Tensor, weight: Tensor, spec: str, name: str | None = None) -> Contender:
    """A packed weight: its timers, bytes and error against float64."""
    first = kbitc.quantize(weight, spec)
    nbytes = first.packed.nbytes()
    copies = [KbitTensor(first.packed.map(torch.clone), first.dtype) for _ in range(copies_of(nbytes))]
    facts = {"spec": spec, "bytes": nbytes, "error": relative_error(x, first)}
    return Contender(name or f"kbitc {spec}", linears(x, copies), facts)


def relative_error(x: Tensor, weight: KbitTensor) -> float:
    """Of the first rows of a product, against float64 with the dequantized weight."""
    dense = weight.dequantize(torch.float32)[:ERROR_ROWS].double()
    exact = x.double() @ dense.T
    product = F.linear(x, weight)[..., :ERROR_ROWS].double()
    return float((product - exact).norm() / exact.norm())
