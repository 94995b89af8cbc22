"""Price every option of every weight: bytes, and what the loss pays for them.

before:  stage CANONICAL, facts "moments" and "outliers" if there was text to measure them on
after:   stage CANONICAL, fact "scores": `ScoreTable`

Each spec is tried on a sample of the weight's own rows. With moments the price of an error dW is
1/2 sum(rows * columns * dW²), in nats per token (`kbitc.sensitivity.moments`), and scales are searched with
the columns' weights, as packing will. Without, it is the relative squared error times the number of
parameters (HIGGS' linear model of the loss, 2411.17525, with equal layer factors), more for the output
head, whose error nothing damps; beside weights that have moments, scaled to their average price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from kbitc.errors import UsageError
from kbitc.formats import datatypes
from kbitc.formats.layout import weight_bytes
from kbitc.formats.packed import Packed
from kbitc.formats.spec import DEFAULT_BLOCK, LEFT_ALONE, Spec, parse
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage, Weight
from kbitc.graph.queries import KINDS, NameGroups, agreeing_groups
from kbitc.graph.stored import rest_bytes
from kbitc.passes.canonicalize import traced_on
from kbitc.planning.packable import check_packable
from kbitc.planning.target import Target
from kbitc.quantizers import settled_quantizer
from kbitc.replay.choice import ordered_quantizer
from kbitc.replay.pricing import Pricing
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import MOMENTS, Moments
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures, share_of
from kbitc.sensitivity.sampled_error import Sample
from kbitc.sensitivity.score_table import SCORES, Option, ScoreTable, monotone
from kbitc.tensor.cores import alone

# Nothing after the head damps its error. SmolLM2-135M at 4.0 bits, WikiText-2 test, 10 x 512 tokens:
# perplexity 46.4, 43.7, 42.6, 46.4 at 1, 3, 10, 30 (16 bits: 30.0). Used without moments alone.
HEAD_IMPORTANCE = 8.0

KINDS_TRIED = 2  # kinds of levels of one number of bits that are tried at all block sizes
FEEDS = 16  # inputs whose second moments feedback's prices are of


def outlier_candidates(in_features: int, count: int) -> tuple[Spec, ...]:
    """Specs that keep ``count`` input features at 16 bits: of each k one, and LLM.int8()'s int8."""
    blocks = {"nf3": 64, "nf4": 64, "nf5": 64, "int6": 128, "int7": 128}
    plain = (*(f"{name}:{block}+dq" for name, block in blocks.items()), f"int8:{in_features}")
    share = share_of(count, in_features)
    return tuple(replace(parse(text), outliers=share) for text in plain)


def default_candidates() -> tuple[Spec, ...]:
    """Every data type at the bits and blocks that its definition names (`kbitc.formats.datatypes.Family`).

    Double quantization stores the same scales in half the bits; its error is part of what is measured.
    """
    every = datatypes.families().values()
    plain = [
        f"{family.name}{bits}:{block}+dq"
        for bits in range(datatypes.MIN_BITS, datatypes.MAX_BITS + 1)
        for family in every
        for block in family.candidates.get(bits, ())
    ]
    centered = [
        f"{family.name}{bits}:{block}+zp+dq"
        for family in every
        for bits, blocks in family.centered_candidates.items()
        for block in blocks
    ]
    return tuple(parse(text) for text in plain + centered)


def _kind(spec: Spec) -> tuple[object, ...]:
    """What specs have in common that differ in block size alone."""
    return spec.bits, spec.family, spec.exponent, spec.has_zero_point, spec.variant


def promising(options: Sequence[Option], numel: int) -> set[tuple[object, ...]]:
    """The best kinds at one block size: `KINDS_TRIED` of each number of bits, those with zero points apart.

    Which family of levels is best depends on the weight and on k, hardly on the block. Each kind that is
    tried in all blocks costs four or five options, and most of the time that they take is Python's.

    Args:
        options: of all kinds, at one block size each.
        numel: of the weight. A bit of it is worth a factor of 4.
    """

    def worth(option: Option) -> float:
        return option.cost * float(4 ** (8 * option.nbytes / numel))

    best: dict[tuple[int, bool], list[tuple[object, ...]]] = {}
    for option in sorted(options, key=worth):
        if not option.spec.outliers:
            key = option.spec.bits, option.spec.has_zero_point
            best.setdefault(key, []).append(_kind(option.spec))
    return {kind for kinds in best.values() for kind in kinds[:KINDS_TRIED]}


@dataclass(frozen=True)
class ScoreSensitivity:
    """Makes the table that the allocator solves.

    Attributes:
        candidates: specs to try; by default `default_candidates`, and for a weight with outlier features
            `outlier_candidates`; leaving a weight at 16 bits is always one more.
        head_importance: without moments, a factor on the cost of a weight that gives the logits.
        quantizer: that will pack the weights; "" for the strongest one that there is evidence for.
        target: whose options and bytes they are; None for kbitc's own artifact.
        types: families of data types that are tried; empty for all.
    """

    candidates: Sequence[Spec] = ()
    head_importance: float = HEAD_IMPORTANCE
    quantizer: str = ""
    target: Target | None = None
    types: Sequence[str] = ()

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[Fact[Any], ...]] = (SCORES,)

    def run(self, program: Program) -> Program:
        """Raises UsageError for a program without a source of weights, or without weights."""
        check_packable(program)
        if program.read is None:
            raise UsageError("scoring needs the weights; this program has no source")
        moments, outliers = program.get(MOMENTS) or {}, program.get(OUTLIERS) or {}
        items = [
            Unpriced(weight, moments.get(name), outliers.get(name, OutlierFeatures()))
            for name, weight in program.weights.items()
        ]
        made: dict[str, tuple[Option, ...]] = {}
        done, total = 0, sum(weight.numel for weight in program.weights.values())
        work = _Scoring(self, replace(program.apart(), facts={}))
        with closing(program.context.engine.run(work, items)) as results:
            for place, own in results:
                weight = items[place].weight
                made[weight.name] = own
                done += weight.numel
                program.context.on_progress(f"pricing {weight.name}", done, total)
        options = self._repriced(program, {name: made[name] for name in program.weights})
        scores = ScoreTable(
            _in_nats(program, options, moments),
            {name: weight.numel for name, weight in program.weights.items()},
            self._rest_bytes(program),
            program.parameter_count,
            source="fisher" if moments else "error",
            unit="nats per token" if moments else "relative",
            quantizer=self.quantizer,
            groups={kind: _joined(agreeing_groups(program, kind)) for kind in KINDS},
            target="" if self.target is None else self.target.name,
        )
        return program.with_fact(SCORES, scores)

    def options(
        self, weight: Weight, data: Tensor, moments: Moments | None, outlying: OutlierFeatures
    ) -> tuple[Option, ...]:
        """The options of a weight, from its data as it is to be stored and what is known of it."""
        sample = Sample.of(weight.oriented(data), moments)
        importance = self.head_importance if weight.is_head else 1.0

        def option(spec: Spec) -> Option:
            price, error = sample.price(spec, outlying.picked(spec), self._quantize)
            if price is None:  # a tied head counts as a head: the same numbers give the logits
                price = importance * weight.numel * error**2
            return Option(spec, self._bytes(weight, spec), price, error)

        first, later = self._candidates(weight, len(outlying.index))
        options = [option(spec) for spec in first]
        kinds = promising(options, weight.numel)
        options += [option(spec) for spec in later if _kind(spec) in kinds]
        return monotone((*options, option(LEFT_ALONE)))

    def _candidates(self, weight: Weight, outliers: int) -> tuple[list[Spec], list[Spec]]:
        """What is tried beside 16 bits, where so many input features may stay outside.

        Returns:
            What is tried at any rate; and other block sizes, of kinds that :func:`promising` names then.
        """
        more = outlier_candidates(weight.in_features, outliers) if 0 < outliers < weight.in_features else ()
        if self.target is not None:
            more = tuple(spec for spec in more if not self.target.misfit(weight, spec))
        usual = default_candidates() if self.target is None else self.target.candidates(weight)
        tried = self.candidates or (*usual, *more)
        tried = tuple(spec for spec in tried if not self.types or spec.family in self.types)
        if self.candidates or self.target is not None:
            return list(tried), []
        first = [spec for spec in tried if spec.block == DEFAULT_BLOCK or spec in more]
        known = set(map(_kind, first))
        first += [spec for spec in tried if _kind(spec) not in known]
        return first, [spec for spec in tried if spec not in set(first)]

    def _bytes(self, weight: Weight, spec: Spec) -> int:
        if self.target is not None:
            return self.target.weight_bytes(weight, spec)
        return weight_bytes(spec, weight.oriented_shape[:-1], weight.in_features)

    def _rest_bytes(self, program: Program) -> int:
        if self.target is None:
            return rest_bytes(program)
        return sum(map(self.target.rest_bytes, program.rest.values()))

    def _repriced(
        self, program: Program, options: dict[str, tuple[Option, ...]]
    ) -> dict[str, tuple[Option, ...]]:
        """Prices of a quantizer that needs the second moments of the inputs."""
        source = program.context.calibration
        quantizer = ordered_quantizer(program, [self.quantizer])
        if quantizer is None or source is None:
            return options
        feeds = source.feeds(FEEDS)
        traced = traced_on(source, feeds[0])
        return Pricing(program, traced, feeds, program.as_stored(source.read), quantizer).run(options)

    def _quantize(self, values: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        return settled_quantizer(self.quantizer, evidence)[1].quantize(values, spec, evidence)


@dataclass(frozen=True)
class Unpriced:
    """A weight, and what its prices are made of.

    Attributes:
        weight: to be priced.
        moments: of it; None where nothing was measured.
        outliers: the input features that formats may keep at 16 bits.
    """

    weight: Weight
    moments: Moments | None
    outliers: OutlierFeatures

    def __str__(self) -> str:
        return self.weight.name


class _Scoring:
    """`kbitc.system.work.Work`: reading a weight, and pricing its options.

    Args:
        scorer: says which options, and what they cost.
        program: apart, see `Program.apart`.
    """

    def __init__(self, scorer: ScoreSensitivity, program: Program) -> None:
        self.scorer, self.program = scorer, program

    def load(self, item: Unpriced) -> Tensor:
        """The weight as it is to be stored."""
        read = self.program.read
        assert read is not None
        return read(item.weight.name)

    def finish(self, item: Unpriced, loaded: Tensor) -> tuple[Option, ...]:
        """Its options, priced."""
        # One after another: of small samples it is Python that takes the time, and two threads take more.
        return alone(partial(self.scorer.options, item.weight, loaded, item.moments, item.outliers))


def _in_nats(
    program: Program, options: Mapping[str, tuple[Option, ...]], moments: Mapping[str, Moments]
) -> dict[str, tuple[Option, ...]]:
    """Costs of one unit: a weight that calibration did not reach counts as those that it did, on average.

    Both costs are quadratic in the error, so that one factor leads from relative squared errors to nats.
    """
    if not moments:
        return dict(options)
    reached = [(program.weights[name].numel, own) for name, own in options.items() if name in moments]
    nats = sum(option.cost for _, own in reached for option in own)
    squared = sum(numel * option.error**2 for numel, own in reached for option in own)
    factor = nats / squared if squared else 0.0
    return {
        name: own if name in moments else tuple(replace(o, cost=o.cost * factor) for o in own)
        for name, own in options.items()
    }


def _joined(groups: NameGroups) -> NameGroups:
    return [names for names in groups if len(names) > 1]


PASS = ScoreSensitivity
