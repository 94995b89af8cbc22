"""Who is compared, and how each is set: lists that are easy to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHIPPED, LINEARS = "as shipped", "linears alone"
BOTH = (SHIPPED, LINEARS)

COMMON = ("transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6")


@dataclass(frozen=True)
class Tool:
    """A package, in an environment of its own.

    Attributes:
        package: the name that pip knows.
        pins: what its environment gets beside torch.
        options: of pip.
    """

    package: str
    pins: tuple[str, ...]
    options: tuple[str, ...] = ()


TOOLS: Mapping[str, Tool] = {
    "bitsandbytes": Tool("bitsandbytes", ("bitsandbytes==0.50.2", *COMMON)),
    "hqq": Tool("hqq", ("hqq==0.2.8.post1", *COMMON)),
    "autoround": Tool("auto-round", ("auto-round==0.16.1", *COMMON)),
    # It chooses its own transformers and numpy, and its build asks for torch.
    "gptqmodel": Tool("gptqmodel", ("gptqmodel==7.6.0",), ("--no-build-isolation",)),
    # Built from source: needs a C++ compiler and some minutes.
    "llama": Tool("llama-cpp-python", ("llama-cpp-python==0.3.36", "gguf==0.19.0", *COMMON)),
}


@dataclass(frozen=True)
class Peer:
    """A setting of a tool.

    Attributes:
        label: its row.
        tool: a key of ``TOOLS``.
        options: that its worker takes.
        views: the comparisons that it is in.
    """

    label: str
    tool: str
    options: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[str, ...] = BOTH


def _bitsandbytes(label: str, *, double: bool) -> Peer:
    return Peer(label, "bitsandbytes", {"type": "nf4", "block": 64, "double": double})


def _hqq(bits: int, group: int, axis: int) -> Peer:
    options = {"bits": bits, "group": group, "axis": axis}
    return Peer(f"HQQ {bits} bits, groups of {group}, axis {axis}", "hqq", options)


def _autoround(bits: int, group: int, iters: int) -> Peer:
    options = {"bits": bits, "group": group, "sym": True, "iters": iters, "batch": 8}
    return Peer(f"AutoRound W{bits}G{group}, {iters} iterations", "autoround", options)


def _gptq(bits: int, group: int, *, gptaq: bool) -> Peer:
    options = {"bits": bits, "group": group, "sym": True, "gptaq": gptaq}
    return Peer(f"{'GPTAQ' if gptaq else 'GPTQ'} {bits} bits, groups of {group}", "gptqmodel", options)


def _llama(kind: str) -> list[Peer]:
    """Its own mix, and with the embedding at 16 bits."""
    shipped = Peer(f"llama.cpp {kind}, imatrix", "llama", {"type": kind, "embedding": ""}, (SHIPPED,))
    label = f"{shipped.label}, embedding F16"
    return [shipped, Peer(label, "llama", {"type": kind, "embedding": "F16"}, (LINEARS,))]


PEERS: tuple[Peer, ...] = (
    _bitsandbytes("bitsandbytes NF4", double=False),
    _bitsandbytes("bitsandbytes NF4, double quantization", double=True),
    *(_hqq(bits, group, axis) for bits, group in ((4, 64), (3, 64), (2, 16), (2, 64)) for axis in (1, 0)),
    *(
        peer
        for kind in ("Q4_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_S", "Q2_K")
        for peer in _llama(kind)
    ),
    *(_gptq(bits, 64, gptaq=gptaq) for bits in (4, 3) for gptaq in (False, True)),
    _autoround(4, 128, 50),
    _autoround(3, 128, 50),
    _autoround(2, 64, 50),
)

# What kbitc is compiled with, beside a budget and the calibration text: (label, arguments).
KBITC: tuple[str, tuple[str, ...]] = ("kbitc", ("--quantizer", "weighted"))

ABLATION_BITS = (4.0, 3.0, 2.5)
# Quantizers, with their options, that are held against the first one.
ABLATION: tuple[str, ...] = ("weighted", "absmax")


def named(quantizer: str) -> tuple[str, tuple[str, ...]]:
    """A quantizer, with its options, as a setting of kbitc."""
    return quantizer, ("--quantizer", quantizer)
