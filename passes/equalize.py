"""Give the input features of weights a scale of their own, and take it back where the features are made.

before:  y = normalized(x) * g + b        q = linear(y, W, c)
after:   y = normalized(x) * (g / s) + b / s        q = linear(y, W * s, c)

before:  y = act(gate) * linear(x, U, c)        z = linear(y, W)
after:   y = act(gate) * linear(x, U / s, c / s)        z = linear(y, W * s)        s divides rows of U

The same between values and the output projection of attention, heads that are repeated together, within
each expert, and through ReLU: wherever `kbitc.graph.feature_flow` finds that nobody else sees the features.
Graph and names stay. s is AWQ's (2306.00978), of a unit j that makes the input features W_:,j of weights,

    s_j = E[x_j²]^(a/2) / max|W_:,j|^b

with the a and b of a grid for which a trial quantization of sampled rows under ``spec`` costs least; s = 1 is
among them. SmolLM2-135M, WikiText-2 test, 10 x 512 tokens, everything quantized, `--quantizer weighted`,
perplexity without / with: 67.0 / 57.2 at 3.0 bits, with s rounded to powers of two 59.6 (16 bits: 30.0).
At 4.0 bits 33.9 / 35.0, likely as its weights lie on a grid of int4:32+zp, which no trial here knows.
stories260K, KL to the source on held-out text: 1.076 / 0.946 at 3.0 bits, 0.147 / 0.130 at 4.0 (with 45 pairs
of exponents in place of 15: 0.959, 0.132); with `--quantizer feedback` 0.455 / 0.442 and 0.073 / 0.069.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from kbitc.checkpoint.tensor_digests import digest_of_tensors
from kbitc.errors import UsageError
from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec, parse
from kbitc.graph.context import ReadTensor
from kbitc.graph.facts import Fact
from kbitc.graph.feature_flow import Flow, Reader, flows
from kbitc.graph.program import Program, Stage, Weight
from kbitc.passes._proof import proven
from kbitc.pipeline.records import Fired
from kbitc.quantizers import choose_quantizer
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import MOMENTS, Factor, Moments
from kbitc.sensitivity.sampled_error import PRICED, Sample, sample_rows
from kbitc.tensor.cores import cores

FACT: Fact[Fired] = Fact("equalize")
GRID = tuple(product((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)))
"""The exponents a of the features' size and b of the weights'."""
LIMIT = 8.0
"""Of log2 s: beyond, floats of 16 bits would lose digits."""


@dataclass(frozen=True)
class Equalize:
    """Scales features between weights so that quantization errs where it costs least.

    Attributes:
        spec: of the trial quantization.
        quantizer: of the trial; "" for the strongest one that there is evidence for.
    """

    spec: str = "nf4:64+dq"
    quantizer: str = ""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    needs_graph: ClassVar[bool] = True
    requires: ClassVar[tuple[Fact[Any], ...]] = (MOMENTS,)
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same function of other tensors, with the moments of those.

        Raises:
            UsageError: no source of weights, or nothing to prove it on.
            PassError: the proof failed.
        """
        if program.read is None:
            raise UsageError("the pass 'equalize' looks at the weights; this program has no source")
        found = list(flows(program))
        left = {flow.name: reason for flow in found if (reason := _obstacle(program, flow))}
        able = [flow for flow in found if flow.name not in left]
        scales: dict[str, Tensor] = {}
        chosen = cores().map(lambda flow: self._scale(flow, program), able)
        for i, (flow, scale) in enumerate(zip(able, chosen, strict=True)):
            program.context.on_progress("equalizing features", i + 1, len(able))
            if scale is None:
                left[flow.name] = "no scale that was tried makes the error smaller"
            else:
                scales[flow.name] = scale
        flowing = [flow for flow in able if flow.name in scales]
        groups = tuple((flow.name, *(reader.weight.name for reader in flow.readers)) for flow in flowing)
        factors = _factors(flowing, scales)
        changed = program.with_changes({name: factor.applied for name, factor in factors.items()})
        proven(program, changed, "equalize")
        moments: Mapping[str, Moments] = {
            name: factors[name].moved(own) if name in factors else own
            for name, own in program.known(MOMENTS).items()
        }
        return changed.with_fact(MOMENTS, moments).with_fact(
            FACT, Fired(groups, left, digest_of_tensors(scales))
        )

    def _scale(self, flow: Flow, program: Program) -> Tensor | None:
        """``(units,)`` or ``(experts, units)``: the best scale of the grid; None if that is 1."""
        assert program.read is not None
        moments, spec = program.known(MOMENTS), parse(self.spec)
        trials = [
            _Trial.of(reader, program.read(reader.weight.name), moments[reader.weight.name])
            for reader in flow.readers
        ]
        energy, peak = (_over_units(flow, trials, what) for what in ("energy", "peak"))
        best, least = None, sum(trial.price(None, spec, self._quantize) for trial in trials)
        for a, b in GRID[1:]:
            scale = _around_one(energy.log2() * (a / 2) - peak.log2() * b, flow.free)
            price = sum(trial.price(scale, spec, self._quantize) for trial in trials)
            if price < least:
                best, least = scale, price
        return best

    def _quantize(self, values: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        return choose_quantizer(self.quantizer, evidence)[1].quantize(values, spec, evidence)


def _obstacle(program: Program, flow: Flow) -> str | None:
    """Why a flow keeps its scale; None if it can have another."""
    if not any(flow.free[reader.units].any() for reader in flow.readers):
        return flow.reason
    unseen = [r.weight.name for r in flow.readers if r.weight.name not in program.known(MOMENTS)]
    return f"nothing was measured of '{unseen[0]}'" if unseen else None


@dataclass(frozen=True)
class _Trial:
    """Sampled rows of a reader, and what is known of its input features, ``(in,)`` or ``(experts, in)``."""

    units: Tensor
    sample: Sample
    experts: Tensor  # (rows of the sample,)
    energy: Tensor
    peak: Tensor

    @staticmethod
    def of(reader: Reader, data: Tensor, moments: Moments) -> _Trial:
        oriented = reader.weight.oriented(data)
        rows, per_expert = oriented.numel() // oriented.shape[-1], oriented.shape[-2]
        experts = sample_rows(rows, oriented.shape[-1], PRICED) // per_expert
        peak = oriented.abs().amax(-2).float()
        return _Trial(reader.units, Sample.of(oriented, moments), experts, moments.importance(), peak)

    def price(self, scale: Tensor | None, spec: Spec, quantize: Any) -> float:
        """What quantizing ``W * s`` costs, in nats per token."""
        sample = self.sample
        if scale is not None:
            columns = scale[..., self.units]
            each = columns if columns.dim() == 1 else columns[self.experts]
            sample = sample.scaled(each)
        price = sample.price(spec, None, quantize)[0]
        assert price is not None  # there are moments
        return price


def _over_units(flow: Flow, trials: list[_Trial], what: str) -> Tensor:
    """A statistic of input features, of all that are one unit: energies are summed, peaks the largest."""
    total: Tensor | None = None
    for trial in trials:
        value = trial.energy if what == "energy" else trial.peak
        if value.dim() == 2 and not flow.is_per_expert:
            value = value.sum(0) if what == "energy" else value.amax(0)
        units = trial.units.expand(value.shape)
        total = value.new_zeros(*value.shape[:-1], len(flow.free)) if total is None else total
        total = total.scatter_reduce(-1, units, value, "sum" if what == "energy" else "amax")
    assert total is not None
    # A feature that is never there, or that no weight reads, is like the least of the others.
    positive = total[total > 0]
    return total.clamp_min(float(positive.min()) if len(positive) else 1.0)


def _around_one(exponent: Tensor, free: Tensor) -> Tensor:
    """Two to the power of exponents around 0, and 1 where a unit is not free."""
    centred = exponent - exponent[..., free].median(-1, keepdim=True).values
    return torch.where(free, centred.clamp(-LIMIT, LIMIT), 0.0).exp2()


@dataclass(frozen=True)
class _Factor:
    """What one stored tensor is multiplied by.

    Attributes:
        weight: None for a vector.
        rows: ``(rows,)`` or ``(experts, rows)``; of a vector its values.
        columns: ``(in,)`` or ``(experts, in)``.
    """

    weight: Weight | None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def applied(self, tensor: Tensor, read: ReadTensor) -> Tensor:
        """The tensor as it is stored, in its own dtype and shape."""
        del read
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        if self.weight is None:
            assert self.rows is not None
            return (wide * self.rows).to(tensor.dtype)
        is_transposed = self.weight.is_transposed
        for factor, is_last in ((self.rows, is_transposed), (self.columns, not is_transposed)):
            if factor is not None:
                wide = wide * (factor.unsqueeze(-2) if is_last else factor.unsqueeze(-1))
        return wide.to(tensor.dtype)

    def moved(self, moments: Moments) -> Moments:
        """The moments of the changed weight: inputs are divided by its columns, gradients by its rows.

        How the tokens of its columns are weighted by their gradients stays as it was measured.
        """
        rows, columns = (
            torch.ones(()) if part is None else part.square().reciprocal()
            for part in (self.rows, self.columns)
        )
        # No Gram matrix: those are of look-up tables, which make no flow and read none.
        factors = tuple(Factor(own.rows * rows, own.columns * columns) for own in moments.factors)
        return Moments(factors, moments.reach)  # outlying is what the model itself computes


def _factors(found: list[Flow], scales: Mapping[str, Tensor]) -> dict[str, _Factor]:
    """All that is divided and multiplied, by the names of stored tensors; a weight may be both."""
    factors: dict[str, _Factor] = {}

    def add(name: str, **parts: Any) -> None:
        factors[name] = replace(factors.get(name, _Factor(None)), **parts)

    for flow in found:
        scale = scales[flow.name]
        if flow.weight is not None:
            add(flow.name, weight=flow.weight, rows=scale.reciprocal())
        for name, units in flow.vectors.items():
            add(name, rows=scale.reciprocal()[units])
        for reader in flow.readers:
            add(reader.weight.name, weight=reader.weight, columns=scale[..., reader.units])
    return factors


PASS = Equalize
