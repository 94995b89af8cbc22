"""Rotate the residual stream, so that no weight around it has outlying columns.

before:  x = E[ids] + linear(h, W, c)        y = normalized(x) * g        q = linear(y, V)
after:   x R = (E R)[ids] + linear(h, R^T W, c R)        y = normalized(x R) * 1        q = linear(y, V g R)

R is orthogonal and random (QuaRot, 2404.00456): Hadamard matrices and random orthogonal ones for odd factors
of the width, after random signs. A token keeps its size, which is all that a norm sees; where a norm
subtracts the mean, R is followed by a reflection such that R 1 = 1. Graph and names stay, so that the
artifact is still the source's model, and nothing is added to what runs.

Gains of norms go into the columns that read them first, and what a norm adds becomes (b / g) R. A gain that
cannot move keeps its stream as it is: above all the last norm's where the head is tied to the embedding,
which would need an operation of its own at run time, and a model of transformers has no place for one.

Not in the usual pipeline: with scales for blocks of 64 few outliers are left to spread, and features whose
importance is spread as well give `weighted` less to go by. stories260K with its head untied, its embedding at
16 bits, KL to the source on held-out text, without / with: nf3:64+dq 0.555 / 0.667, nf4:64+dq 0.090 / 0.110.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import scipy.linalg
import torch
from torch import Tensor

from kbitc.errors import UsageError
from kbitc.graph.context import ReadTensor
from kbitc.graph.facts import Fact
from kbitc.graph.feature_flow import Flow, Reader, flows
from kbitc.graph.program import Program, Stage, Weight
from kbitc.graph.residual_stream import Stream, streams
from kbitc.passes._proof import proven
from kbitc.pipeline.records import Fired
from kbitc.sensitivity.moments import MOMENTS

FACT: Fact[Fired] = Fact("rotate")
LARGEST = 64  # of a Hadamard factor: a larger one is a product of several
PIECE = 1 << 22  # values that are rotated at once
STEEPEST = 1e3  # of a LayerNorm's shift over its gain: float32 has seven digits, and weights keep three

Change: TypeAlias = Callable[[Tensor, ReadTensor], Tensor]


@dataclass(frozen=True)
class Rotate:
    """Rotates every residual stream around which everything can turn.

    Attributes:
        seed: of signs and orthogonal factors.
    """

    seed: int = 0

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same function of other tensors; candidates are residual streams.

        Raises:
            UsageError: the inputs of weights were measured before, or there is nothing to prove it on.
            PassError: the proof failed.
        """
        if program.get(MOMENTS) is not None:
            raise UsageError(
                "the pass 'rotate' changes the inputs that 'measure_moments' measures: put it before that"
            )
        if program.read is None:
            raise UsageError("the pass 'rotate' looks at the weights; this program has no source")
        norms = {flow.name: flow for flow in flows(program) if flow.weight is None}
        found = list(streams(program, partial(_obstacle, program, norms)))
        left = {stream.name: stream.reason for stream in found if stream.reason}
        turning = [stream for stream in found if not stream.reason]
        groups = tuple((*stream.inner, *stream.outer, *stream.vectors) for stream in turning)
        if not turning:
            return program.with_fact(FACT, Fired((), left))
        gains = [norms[gain] for stream in turning for gain in stream.gains]
        rotated = program.with_changes(_folded(gains))
        for i, stream in enumerate(turning):
            rotation = Rotation.of(stream.width, self.seed + i, is_centred=stream.is_centred)
            for change in (_changes(program, stream, rotation, is_inner) for is_inner in (True, False)):
                rotated = rotated.with_changes(change)
        proven(program, rotated, "rotate")
        return rotated.with_fact(FACT, Fired(groups, left, f"seed {self.seed}"))


def _obstacle(program: Program, norms: Mapping[str, Flow], name: str) -> str | None:
    """Why the gain of a norm cannot be moved into the weights that read it; None if it can."""
    flow = norms.get(name)
    if flow is None:
        return "it is no parameter, or read in several places"
    if not flow.free.all():
        return flow.reason
    read = program.read
    assert read is not None
    gain = read(name).double()
    for shift in sorted(flow.vectors.keys() - {name}):
        ratio = float((read(shift).double() / gain).abs().nan_to_num(torch.inf).max())
        if not ratio <= STEEPEST:
            return f"'{shift}' is up to {ratio:.0g} times as large, and would cost digits"
    return None


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R of ``(width, width)``: signs, a Kronecker product, perhaps a reflection.

    Attributes:
        signs: ``(width,)`` of ones and minus ones.
        factors: orthogonal matrices, whose sizes multiply to the width.
        normal: ``(width,)`` of length 1, the reflection's; None for none.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]
    normal: Tensor | None = None

    @staticmethod
    def of(width: int, seed: int, *, is_centred: bool = False) -> Rotation:
        """A random one, in float32; with ``R 1 = 1`` if it is to be centred."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        factors = tuple(_orthogonal(size, generator) for size in _sizes(width))
        turned = Rotation(signs, factors)
        normal = None
        if is_centred:
            ones = torch.full((width,), width**-0.5, dtype=torch.float64)
            gap = turned.applied(ones) - ones
            normal = gap / gap.norm() if gap.norm() > 0 else None
        return Rotation(
            signs.float(), tuple(f.float() for f in factors), None if normal is None else normal.float()
        )

    def applied(self, rows: Tensor) -> Tensor:
        """``rows @ R``: (..., width), in the dtype of R."""
        turned = (rows * self.signs).reshape(-1, *(len(factor) for factor in self.factors))
        for i, factor in enumerate(self.factors, 1):
            turned = torch.movedim(torch.movedim(turned, i, -1) @ factor, -1, i)
        out = turned.reshape(rows.shape)
        if self.normal is None:
            return out
        return out - 2 * (out @ self.normal).unsqueeze(-1) * self.normal


def _sizes(width: int) -> list[int]:
    """Factors of a width: its odd part, and powers of two of at most ``LARGEST``."""
    odd, sizes = width, []
    while odd % 2 == 0:
        odd //= 2
    even = width // odd
    while even > 1:
        sizes.append(min(even, LARGEST))
        even //= sizes[-1]
    return [odd, *sizes] if odd > 1 or not sizes else sizes


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix of length-1 rows for a power of two, else a random orthogonal one; float64."""
    if size & (size - 1) == 0:
        return torch.from_numpy(scipy.linalg.hadamard(size)).double() / math.sqrt(size)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed


# Changes: in the source's dtype, as everything that is read; computed in float32.


def _folded(gains: Iterable[Flow]) -> dict[str, Change]:
    """Gains of ones: what is added is divided by them, and the columns that read the norm multiplied."""
    changes: dict[str, Change] = {}
    for flow in gains:
        for vector in flow.vectors:
            changes[vector] = partial(_divided, flow.name)
        changes[flow.name] = lambda gain, _: torch.ones_like(gain)
        for reader in flow.readers:
            changes[reader.weight.name] = partial(_multiplied, flow.name, reader)
    return changes


def _divided(gain: str, shift: Tensor, read: ReadTensor) -> Tensor:
    return (shift.float() / read(gain).float()).to(shift.dtype)


def _multiplied(gain: str, reader: Reader, data: Tensor, read: ReadTensor) -> Tensor:
    """``W * g``: (..., rows, in) or, transposed, (..., in, rows)."""
    columns = read(gain).float()[reader.units]
    return (data.float() * (columns[:, None] if reader.weight.is_transposed else columns)).to(data.dtype)


def _changes(program: Program, stream: Stream, rotation: Rotation, is_inner: bool) -> dict[str, Change]:
    """Of one side of the weights: one that reads the stream and makes it turns on both."""
    names = stream.inner if is_inner else stream.outer
    changes: dict[str, Change] = {
        name: partial(_turned, rotation, program.weights[name], is_inner) for name in names
    }
    if not is_inner:
        for name in stream.vectors:
            changes[name] = lambda vector, _: rotation.applied(vector.float()).to(vector.dtype)
    return changes


def _turned(rotation: Rotation, weight: Weight, is_inner: bool, data: Tensor, read: ReadTensor) -> Tensor:
    """``W R`` of the input features, or ``R^T W`` of the rows."""
    del read
    is_last = is_inner != weight.is_transposed
    rows = data if is_last else data.mT
    flat = rows.reshape(-1, rows.shape[-1])
    out = torch.empty_like(flat)
    step = max(1, PIECE // flat.shape[-1])
    for i in range(0, len(flat), step):
        out[i : i + step] = rotation.applied(flat[i : i + step].float())
    turned = out.view(rows.shape)
    return turned if is_last else turned.mT.contiguous()


PASS = Rotate
