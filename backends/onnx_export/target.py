"""What ONNX Runtime's file takes of each weight, before there is one.

The one thing to know: its packed matmul has 2, 4 and 8 bits, of evenly spaced levels. With 32-bit activations
every width is made of 4-bit terms (`kbitc.backends.onnx_export.container`), so that a plan chooses between 4
and 8 bits, block sizes, zero points and the storage of scales. Tables that are only looked up hold any code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from kbitc.backends.onnx_export.container import Container, container_of
from kbitc.backends.onnx_export.geometry import make_geometry
from kbitc.formats import bit_planes
from kbitc.formats.codebooks import shared_codebook
from kbitc.formats.spec import SCALE_GROUP, Spec, parse
from kbitc.graph.program import Rest, Weight
from kbitc.passes.score_sensitivity import default_candidates

BLOCKS = {"sint4": (16, 32, 64, 128), "int4": (16, 32, 64, 128), "int8": (32, 64, 128)}
CENTRED = {"int4": (32, 64, 128)}


@cache
def contained() -> tuple[Spec, ...]:
    """What the packed matmul holds exactly, without a bit to spare."""
    plain = [f"{kind}:{block}+dq" for kind, blocks in BLOCKS.items() for block in blocks]
    centred = [f"{kind}:{block}+zp+dq" for kind, blocks in CENTRED.items() for block in blocks]
    return tuple(map(parse, plain + centred))


@dataclass(frozen=True)
class OnnxTarget:
    """See `kbitc.planning.target.Target`; of the export's default options."""

    name: ClassVar[str] = "onnx"
    agree: ClassVar[str] = ""

    def candidates(self, weight: Weight) -> tuple[Spec, ...]:
        """Codes of any kind where nothing multiplies by it; what the packed matmul holds otherwise."""
        return tuple(s for s in default_candidates() if not s.is_fitted) if _is_table(weight) else contained()

    def misfit(self, weight: Weight, spec: Spec) -> str:
        """A wider container, or one that is not exact."""
        if spec.is_left_alone or _is_table(weight):
            return ""
        container = _container(spec)
        if container is None or not container.is_exact:
            return f"{container.name if container else 'MatMulNBits'}, not exactly"
        return "" if sum(container.widths) == spec.bits else container.name

    def weight_bytes(self, weight: Weight, spec: Spec) -> int:
        """Of the initializers that `kbitc.backends.onnx_export.weight` writes."""
        *lead, rows, width = weight.oriented_shape
        if spec.is_left_alone:
            return 4 * weight.numel
        experts = math.prod(lead)
        count = math.ceil(width / spec.block)
        container = _container(spec)
        if _is_table(weight):
            codes = sum(rows * math.ceil(width * bits / 8) for bits in bit_planes.PLANES[spec.bits])
        else:
            widths = container.widths if container else (4, 4)
            blocks = make_geometry(width, spec.block, 32 if 2 in widths else 16)
            codes = sum(rows * blocks.stored * bits // 8 for bits in widths)
        total = codes + _scale_bytes(spec, rows * count, is_expert=bool(lead))
        if spec.has_zero_point:
            total += rows * count * (2 if _is_table(weight) else 4)
        total += 2 * rows * spec.outlier_count(width)
        return experts * total

    def rest_bytes(self, rest: Rest) -> int:
        """Floats are at 32 bits there."""
        return rest.numel * (4 if rest.dtype.is_floating_point else rest.dtype.itemsize)


def _is_table(weight: Weight) -> bool:
    return set(weight.kinds) == {"embedding"}


def _scale_bytes(spec: Spec, scales: int, *, is_expert: bool) -> int:
    """Of one matrix: as the artifact has them, those of experts apart from each other in 32 bits."""
    if not spec.has_double_quant:
        return 2 * scales
    return 4 * scales if is_expert else math.ceil(scales / SCALE_GROUP) * (SCALE_GROUP + 4)


@cache
def _container(spec: Spec) -> Container | None:
    """That of any weight of a spec; None where it depends on the weight."""
    if spec.is_fitted:
        return None
    codebook = shared_codebook(spec).double().numpy()
    mass = np.full(len(codebook), 1 / len(codebook))
    return container_of(codebook, mass, spec.block, "fp32", has_zeros=spec.has_zero_point)
