"""Price every option of every weight: bytes, and what the loss pays for them.

before:  stage CANONICAL, facts "moments" and "outliers" if there was text to measure them on
after:   stage CANONICAL, fact "scores": `Scores`

Each spec is tried on a sample of the weight's own rows. With moments the price of an error dW is
1/2 sum(rows * columns * dW²), in nats per token (`kbitc.moments`), and scales are searched with the
columns' weights, as packing will. Without, it is the relative squared error times the number of
parameters (HIGGS' linear model of the loss, 2411.17525, with equal layer factors), more for the output
head, whose error nothing damps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from kbitc import outliers, scoring
from kbitc.errors import UsageError
from kbitc.graphs import KINDS, Groups, agreeing_groups
from kbitc.moments import Moments
from kbitc.outliers import Found, share_of
from kbitc.passes import measure_moments
from kbitc.program import Program, Stage, Weight
from kbitc.scores import Option, Scores, monotone
from kbitc.spec import LEFT_ALONE, Spec, parse

FACT = "scores"
# Nothing after the head damps its error. SmolLM2-135M at 4.0 bits, WikiText-2 test, 10 x 512 tokens:
# perplexity 46.4, 43.7, 42.6, 46.4 at 1, 3, 10, 30 (16 bits: 30.0). Used without moments alone.
HEAD_IMPORTANCE = 8.0


def outlier_candidates(in_features: int, count: int) -> tuple[Spec, ...]:
    """Specs that keep ``count`` input features at 16 bits: of each k one, and LLM.int8()'s int8."""
    blocks = {"nf3": 64, "nf4": 64, "nf5": 64, "int6": 128, "int7": 128}
    plain = (*(f"{name}:{block}+dq" for name, block in blocks.items()), f"int8:{in_features}")
    share = share_of(count, in_features)
    return tuple(replace(parse(text), outliers=share) for text in plain)


def default_candidates() -> tuple[Spec, ...]:
    """Every data type that leads somewhere at some k, in blocks of 32 to 256 (PAPERS sections 7 and 8).

    Double quantization stores the same scales in half the bits; its error is part of what is measured.
    """
    families = {
        2: ("nf", "bof", "int", "learned"),
        3: ("nf", "bof", "int", "fp", "learned"),
        4: ("nf", "bof", "int", "fp", "dynamic", "learned"),
        5: ("nf", "bof", "int", "fp"),
        6: ("nf", "int", "fp"),
        7: ("int", "fp"),
        8: ("int",),
    }
    plain = [
        f"{family}{bits}:{block}+dq"
        for bits, names in families.items()
        for family in names
        for block in (32, 64, 128, 256)
    ]
    # Between 3.25 and 4.25 bits there is little else, and a small model's embedding is one choice.
    plain += [f"{family}{bits}:16+dq" for bits in (2, 3) for family in ("nf", "bof", "learned")]
    with_zero = [f"int{bits}:{block}+zp+dq" for bits in (2, 3, 4) for block in (32, 64, 128)]
    return tuple(parse(text) for text in plain + with_zero)


@dataclass(frozen=True)
class ScoreSensitivity:
    """Makes the table that the allocator solves.

    Attributes:
        candidates: specs to try; by default `default_candidates`, and for a weight with outlier features
            `outlier_candidates`; leaving a weight at 16 bits is always one more.
        head_importance: without moments, a factor on the cost of a weight that gives the logits.
        on_weight: progress, ``(name, done, all)``.
    """

    candidates: Sequence[Spec] = ()
    head_importance: float = HEAD_IMPORTANCE
    on_weight: Callable[[str, int, int], None] = lambda *_: None

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    provides: ClassVar[tuple[str, ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """Raises UsageError for a program without a source of weights."""
        if program.read is None:
            raise UsageError("scoring needs the weights; this program has no source")
        read = program.read
        moments = cast("Mapping[str, Moments]", program.facts.get(measure_moments.FACT, {}))
        # Samples are small, so weights run side by side, one thread each.
        workers = torch.get_num_threads()
        options = {}
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = pool.map(
                lambda weight: self._options(
                    weight,
                    read(weight.name),
                    moments.get(weight.name),
                    outliers.of_weight(program.facts, weight.name) or Found(),
                ),
                program.weights.values(),
            )
            for i, (name, own) in enumerate(zip(program.weights, found, strict=True), start=1):
                options[name] = own
                self.on_weight(name, i, len(program.weights))
        scores = Scores(
            options,
            {name: weight.numel for name, weight in program.weights.items()},
            fixed_bytes(program),
            program.parameter_count,
            source="fisher" if moments else "error",
            unit="nats per token" if moments else "relative",
            groups={kind: _joined(agreeing_groups(program, kind)) for kind in KINDS},
        )
        return program.with_fact(FACT, scores)

    def _options(
        self, weight: Weight, data: Tensor, moments: Moments | None, outlying: Found
    ) -> tuple[Option, ...]:
        sample = scoring.Sample.of(data.mT if weight.is_transposed else data, moments)
        importance = self.head_importance if weight.is_head else 1.0
        found = []
        count = len(outlying.index)
        more = outlier_candidates(weight.in_features, count) if 0 < count < weight.in_features else ()
        for spec in (*(self.candidates or (*default_candidates(), *more)), LEFT_ALONE):
            price, error = sample.price(spec, outlying.picked(spec))
            if price is None:  # a tied head counts as a head: the same numbers give the logits
                price = importance * weight.numel * error**2
            nbytes = spec.packed_bytes(weight.rows, weight.in_features)
            found.append(Option(spec, nbytes, price, error))
        return monotone(tuple(found))


def _joined(groups: Groups) -> Groups:
    return [names for names in groups if len(names) > 1]


def fixed_bytes(program: Program) -> int:
    """Bytes that no choice changes: everything that stays unpacked, floats at 16 bits."""
    sizes = (
        rest.numel * (min(2, rest.dtype.itemsize) if rest.dtype.is_floating_point else rest.dtype.itemsize)
        for rest in program.rest.values()
    )
    return sum(sizes)


PASS = ScoreSensitivity
