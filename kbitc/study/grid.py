"""The grid of a study: all bits, data types and block sizes, plain and with what is to be compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kbitc.errors import UsageError
from kbitc.formats.datatypes import MAX_BITS, MIN_BITS, families, find_family
from kbitc.formats.spec import parse
from kbitc.quantizers import find_quantizer
from kbitc.study.formats import SIXTEEN_BITS, Format

ABSMAX = "absmax"
LINEAR, ALL = "linear", "all"
SCOPES = {LINEAR: "matrices of attention and feed-forward layers, as in the paper", ALL: "every matrix"}
PROXY = re.compile(r"proxy:(?P<percent>\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Treatment:
    """What a job does to the weights of a model.

    Attributes:
        form: of each weight that it quantizes.
        quantizer: chooses codes and scales.
    """

    form: Format
    quantizer: str = ABSMAX

    def __str__(self) -> str:
        return str(self.form) if self.quantizer == ABSMAX else f"{self.form} by {self.quantizer}"


@dataclass(frozen=True)
class Grid:
    """Treatments to try on each model.

    Attributes:
        bits: of a code.
        types: data types, with variants and zero points as specs have them: "fp", "fp+paper", "int+zp".
        blocks: weights a scale.
        quantizers: names; "absmax" is the paper's.
        outliers: percent of the input features that the proxy keeps at 16 bits, tried beside none.
        with_mean: each plain format is also tried centred.
        is_flat: blocks cross rows in all of them.
    """

    bits: Sequence[int]
    types: Sequence[str]
    blocks: Sequence[int]
    quantizers: Sequence[str] = (ABSMAX,)
    outliers: Sequence[float] = ()
    with_mean: bool = False
    is_flat: bool = False

    def __post_init__(self) -> None:
        for quantizer in self.quantizers:
            find_quantizer(quantizer)
        others = [name for name in self.quantizers if name != ABSMAX]
        if others and (self.is_flat or self.with_mean):
            raise UsageError(
                f"--quantizer {others[0]}: --flat-blocks and --mean are of the paper's quantizer, absmax; "
                "run a second sweep for the other one, into the same results"
            )

    def treatments(self) -> list[Treatment]:
        """In order and without repetition; 16 bits first.

        Raises:
            UsageError: a data type that there is not, or not at these bits.
        """
        made = [Treatment(SIXTEEN_BITS)]
        for type_, bits, block in itertools.product(self.types, self.bits, self.blocks):
            for form, quantizer in itertools.product(self._forms(type_, bits, block), self.quantizers):
                made.append(Treatment(form, quantizer))
        return list(dict.fromkeys(made))

    def _forms(self, type_: str, bits: int, block: int) -> Iterator[Format]:
        family, *flags = type_.split("+")
        find_family(family)
        plain = Format(parse("+".join([f"{family}{bits}:{block}", *flags])), is_flat=self.is_flat)
        yield plain
        if self.with_mean:
            yield replace(plain, has_mean=True)
        for percent in self.outliers:
            yield replace(plain, spec=replace(plain.spec, outliers=percent))


def parse_numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """Numbers and ranges: "3-8", "64,256".

    >>> parse_numbers("--bits", "3-5,8", 2, 8)
    [3, 4, 5, 8]

    Raises:
        UsageError: neither, or out of bounds.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"{option} {text}: '{part}' is neither a number nor a range such as 3-8")
        first, last = int(match[1]), int(match[2] or match[1])
        if not low <= first <= last <= high:
            raise UsageError(f"{option} {text}: '{part.strip()}' is not within {low} to {high}")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def parse_bits(text: str) -> list[int]:
    """Of ``--bits``."""
    return parse_numbers("--bits", text, MIN_BITS, MAX_BITS)


def parse_types(text: str) -> list[str]:
    """Of ``--types``: data types, "all" for all of them.

    Raises:
        UsageError: one that there is not.
    """
    if text == "all":
        return list(families())
    names = [name.strip() for name in text.split(",")]
    for name in names:
        find_family(name.partition("+")[0])
    return names


def parse_quantizers(text: str) -> list[str]:
    """Of ``--quantizer``: names, with options in brackets or without.

    >>> parse_quantizers("absmax, feedback(no-target, polish=1)")
    ['absmax', 'feedback(no-target, polish=1)']
    """
    return [name.strip() for name in re.split(r",(?![^(]*\))", text)]


def parse_outliers(text: str) -> list[float]:
    """Of ``--outliers``: percentages of "proxy:2%".

    >>> parse_outliers("proxy:2%,proxy:0.5%")
    [2.0, 0.5]

    Raises:
        UsageError: anything else.
    """
    percents = []
    for part in filter(None, text.split(",")):
        match = PROXY.fullmatch(part.strip())
        if match is None or not 0.0 < float(match["percent"]) < 100.0:
            raise UsageError(f"--outliers {text}: expected a share of input features such as proxy:2%")
        percents.append(float(match["percent"]))
    return percents
