"""Linear layers that `benchmarks.gpu_linear` compares: torch, kbitc and peers.

Each builder takes a dense (rows, in_features) weight on the device and the clock, and gives as many copies
of the layer as the L2 cache does not hold. A peer is imported only when it is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kbitc
from benchmarks.gpu import Clock
from kbitc.tensor.kbit_tensor import KbitTensor

GROUP = 64
PEER_PACKAGES = ("bitsandbytes", "gemlite", "torchao")

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One contender.

    Attributes:
        products: x (m, in_features) -> (m, rows), one for each copy of the weight.
        nbytes: that one copy stores.
        dense: float32 (rows, in_features), what the stored weight stands for; None: the peer does not tell.
    """

    name: str
    products: Sequence[Product]
    nbytes: int
    dense: Tensor | None

    def error(self, x: Tensor) -> float | None:
        """Of a product, relative, against float64 with the dequantized weight."""
        if self.dense is None:
            return None
        exact = x.double() @ self.dense.double().T
        return float((self.products[0](x).double() - exact).norm() / exact.norm())


Builder = Callable[[Tensor, Clock], Layer]


def torch_dense(weight: Tensor, clock: Clock) -> Layer:
    """F.linear of torch itself."""
    weights = [weight.clone() for _ in range(clock.copies_of(weight.nbytes))]
    products = [partial(F.linear, weight=each) for each in weights]
    return Layer(dense_name(weight.dtype), products, weight.nbytes, weight.float())


def dense_name(dtype: torch.dtype) -> str:
    """How the dense row is called."""
    return f"torch {'bf16' if dtype == torch.bfloat16 else 'fp16'}"


def packed(weight: Tensor, clock: Clock, spec: str) -> Layer:
    """F.linear with a packed weight."""
    first = kbitc.quantize(weight, spec)
    nbytes = first.packed.nbytes()
    weights = [KbitTensor(first.packed.map(torch.clone), first.dtype) for _ in range(clock.copies_of(nbytes))]
    products = [partial(F.linear, weight=each) for each in weights]
    return Layer(packed_name(spec), products, nbytes, first.dequantize(torch.float32))


def packed_name(spec: str) -> str:
    """How the row of a spec is called."""
    return f"kbitc {spec}"


def torch_int4pack(weight: Tensor, clock: Clock) -> Layer:
    """The int4 product that torch itself has: symmetric codes, bfloat16 scales.

    Raises:
        ValueError: the weight is not bfloat16, which this product needs.
    """
    if weight.dtype != torch.bfloat16:
        raise ValueError("takes bf16 inputs alone")
    codes, scales = _int4(weight)
    dense = _dequantized(codes, scales, 8)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).contiguous()  # zero points are floats
    if clock.is_cuda:
        both = codes[:, ::2] << 4 | codes[:, 1::2]
        stored = torch.ops.aten._convert_weight_to_int4pack(both, 8)
        product = torch.ops.aten._weight_int4pack_mm
    else:
        stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    nbytes = stored.nbytes + pairs.nbytes
    products = [
        partial(_int4pack_product, product, stored.clone(), pairs.clone())
        for _ in range(clock.copies_of(nbytes))
    ]
    return Layer(f"torch int4pack :{GROUP}", products, nbytes, dense)


def _int4pack_product(product: Callable[..., Tensor], stored: Tensor, pairs: Tensor, x: Tensor) -> Tensor:
    return product(x, stored, GROUP, pairs)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 1…15 of 8 + w / scale, uint8 (rows, in_features), and scales (rows, in_features / GROUP)."""
    blocks = weight.float().unflatten(-1, (-1, GROUP))
    scales = (blocks.abs().amax(-1) / 7).to(weight.dtype)
    codes = (blocks / scales.float()[..., None]).round().clamp(-7, 7) + 8
    return codes.flatten(-2).to(torch.uint8), scales


def _dequantized(codes: Tensor, scales: Tensor, zero: int) -> Tensor:
    return (codes.float() - zero) * scales.float().repeat_interleave(GROUP, -1)


def bitsandbytes_nf4(weight: Tensor, clock: Clock) -> Layer:
    """Linear4bit of bitsandbytes, without double quantization."""
    import bitsandbytes

    rows, features = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        features, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=False
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=GROUP,
        compress_statistics=False,
        quant_type="nf4",
        module=layer,
    )
    layer = layer.to(clock.device).eval()
    state = layer.weight.quant_state
    dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float()
    nbytes = layer.weight.data.nbytes + state.absmax.nbytes
    return Layer(f"bitsandbytes nf4:{GROUP}", _copies(layer, clock, nbytes), nbytes, dense)


def gemlite_int4(weight: Tensor, clock: Clock) -> Layer:
    """GemLite's 4-bit integers with 16-bit inputs."""
    from gemlite.core import DType, GemLiteLinear

    rows, features = weight.shape
    codes, scales = _int4(weight)
    kind = DType.BF16 if weight.dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(
        4, group_size=GROUP, in_features=features, out_features=rows, input_dtype=kind, output_dtype=kind
    )
    layer.pack(codes, scales, 8, None)
    nbytes = sum(part.nbytes for part in (layer.W_q, layer.scales, layer.zeros))
    return Layer(
        f"GemLite int4:{GROUP}", _copies(layer, clock, nbytes), nbytes, _dequantized(codes, scales, 8)
    )


def torchao_int4(weight: Tensor, clock: Clock) -> Layer:
    """The int4 weights of torchao for CUDA devices."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    rows, features = weight.shape
    layer = nn.Linear(features, rows, bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = nn.Sequential(layer)
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    stored: Any = model[0].weight
    nbytes = stored_bytes(stored)
    try:
        dense = stored.dequantize().float()
    except (AttributeError, NotImplementedError, RuntimeError):  # this packing may have no way back
        dense = None
    return Layer(f"torchao int4:{GROUP}", _copies(model[0], clock, nbytes), nbytes, dense)


def stored_bytes(tensor: Any) -> int:
    """Of a tensor, or of the tensors that a subclass wraps."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _copies(layer: nn.Module, clock: Clock, nbytes: int) -> list[nn.Module]:
    return [copy.deepcopy(layer) for _ in range(clock.copies_of(nbytes))]


PEERS: dict[str, Builder] = {
    "torch int4pack": torch_int4pack,
    "bitsandbytes": bitsandbytes_nf4,
    "GemLite": gemlite_int4,
    "torchao": torchao_int4,
}
