"""Spec strings: one short name for the format of one weight, e.g. ``nf4:64+dq``.

Grammar: ``FAMILY BITS [eEXPONENT] [:BLOCK] [+zp] [+dq | +sbS] [+outP%] [+VARIANT] [+a8]``, or ``fp16``
for a weight that is left at 16 bits. ``parse(str(spec)) == spec`` always. A plan may also say ``+out``
without a share: `Wish`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kbitc.errors import UsageError, did_you_mean
from kbitc.formats import datatypes

DEFAULT_BLOCK = 64
SCALE_GROUP = 256  # scales that share one fp32 constant under double quantization (QLoRA)
SUPER_BLOCK = 256  # weights whose scales are integers times one constant under +sb (llama.cpp's K-quants)
INT8 = 8
MAX_SCALE_BITS, MIN_SCALE_BITS = 8, 4
OF_STUDIES = ("mean", "flat")  # flags of `kbitc.study.formats`, which no packed weight has
EXAMPLES = "nf4:64, int3:128+zp, fp4e2:64+dq, nf3:64+out0.5%, fp16"

_PATTERN = re.compile(r"(?P<family>[a-z_]+?)(?P<bits>\d+)(?:e(?P<exponent>\d+))?(?::(?P<block>-?\d+))?")
_SCALES = re.compile(r"sb(?P<bits>\d+)")
_OUTLIERS = re.compile(r"out(?P<percent>\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Spec:
    """The format of one weight.

    Attributes:
        family: name of a data type (`kbitc.formats.datatypes.families`); "fp16" leaves the weight alone.
        bits: bits a code, 2 to 8 (16 for "fp16").
        block: consecutive weights along the input dimension that share one scale.
        exponent: exponent bits of ``fp``; None takes the default width.
        has_zero_point: ``+zp``: each block is centred on the middle of its range.
        has_double_quant: ``+dq``: scales are stored as 8-bit dynamic codes in groups of 256.
        scale_bits: ``+sb6``: scales are integers of so many bits times a constant of each super-block, 256
            weights of a row, and so are zero points; 0 where they are free (`kbitc.formats.scale_grid`).
        outliers: share of input features kept at 16 bits, in percent; 0 for none.
        variant: "" or the name of a published construction of the data type.
        has_int8_inputs: ``+a8``: linears round each row of their input to int8, the outlier features apart,
            and multiply in integers (LLM.int8()); of ``int8`` with one scale a row.
    """

    family: str
    bits: int
    block: int = DEFAULT_BLOCK
    exponent: int | None = None
    has_zero_point: bool = False
    has_double_quant: bool = False
    scale_bits: int = 0
    outliers: float = 0.0
    variant: str = ""
    has_int8_inputs: bool = False

    def __post_init__(self) -> None:
        if self.is_left_alone:
            return
        family = datatypes.find_family(self.family)
        low, high = datatypes.MIN_BITS, datatypes.MAX_BITS
        if not low <= self.bits <= high:
            raise UsageError(f"{self}: {self.bits} bits a weight; kbitc packs {low} to {high} bits")
        if self.block < 1:
            raise UsageError(f"{self}: block size {self.block}; it must be at least 1, for example 64")
        if self.exponent is not None and (self.family != "fp" or not 1 <= self.exponent <= self.bits - 1):
            raise UsageError(f"{self}: only fp takes exponent bits, 1 to {self.bits - 1} of them here")
        if not 0.0 <= self.outliers < 100.0:
            raise UsageError(f"{self}: outlier share {self.outliers} %; it must be in [0, 100)")
        if self.variant and self.variant not in family.variants:
            raise UsageError(
                f"{self}: " + did_you_mean(f"{self.family} variant", self.variant, family.variants)
            )
        if self.variant:
            self._check_variant(family.variants[self.variant])
        if self.scale_bits:
            self._check_super_blocks()
        is_int8 = self.family == "int" and self.bits == INT8 and not self.has_zero_point
        if self.has_int8_inputs and not is_int8:
            raise UsageError(f"{self}: +a8 multiplies integers of 8 bits: int8 without zero points")

    def _check_variant(self, variant: datatypes.Variant) -> None:
        if variant.bits and self.bits not in variant.bits:
            raise UsageError(
                f"{self}: +{self.variant} is of {', '.join(map(str, variant.bits))} bits, not {self.bits}"
            )
        if variant.is_centered not in (None, self.has_zero_point):
            how = "needs +zp: its levels start at a block's minimum" if variant.is_centered else "has no +zp"
            raise UsageError(f"{self}: +{self.variant} {how}")
        if variant.has_integer_zeros and (self.has_double_quant or self.scale_bits):
            raise UsageError(f"{self}: +{self.variant} has scales of few bits itself; leave +dq and +sb away")

    def _check_super_blocks(self) -> None:
        if not MIN_SCALE_BITS <= self.scale_bits <= MAX_SCALE_BITS:
            raise UsageError(
                f"{self}: scales of {self.scale_bits} bits; +sb takes {MIN_SCALE_BITS} to {MAX_SCALE_BITS}"
            )
        if self.has_double_quant:
            raise UsageError(f"{self}: +sb and +dq are two ways to store scales; name one of them")
        if SUPER_BLOCK % self.block or self.block == SUPER_BLOCK:
            raise UsageError(
                f"{self}: +sb divides {SUPER_BLOCK} weights into blocks; {self.block} do not fit"
            )
        if self.has_zero_point and not self.is_from_minimum:
            raise UsageError(
                f"{self}: +sb has zero points that are minima; write +zp+sb{self.scale_bits}+min"
            )

    @property
    def is_left_alone(self) -> bool:
        """True for ``fp16``: the weight is stored at 16 bits and not touched."""
        return self.family == "fp16"

    @property
    def is_fitted(self) -> bool:
        """True where the codebook depends on the weight, and is stored with it."""
        return datatypes.find_family(self.family).is_fitted

    @property
    def is_from_minimum(self) -> bool:
        """True where the zero point is a block's minimum."""
        return self._variant.is_from_minimum

    @property
    def has_integer_zeros(self) -> bool:
        """True where it is a whole number of steps below 0."""
        return self._variant.has_integer_zeros

    @property
    def _variant(self) -> datatypes.Variant:
        variants = datatypes.find_family(self.family).variants
        return variants[self.variant] if self.variant else datatypes.Variant()

    @property
    def is_signed(self) -> bool:
        """True where blocks are divided by the element of largest magnitude *with its sign*."""
        return datatypes.find_family(self.family).is_signed and not self.has_zero_point

    @property
    def datatype(self) -> str:
        """Family, bits, exponent and variant: what a shared codebook is filed under."""
        exponent = "" if self.exponent is None else f"e{self.exponent}"
        variant = f"+{self.variant}" if self.variant else ""
        return f"{self.family}{self.bits}{exponent}{variant}"

    @property
    def codebook_name(self) -> str:
        """What the codebook is filed under, where weights share it: same name, same levels."""
        family = datatypes.find_family(self.family)
        block = f":{self.block}" if family.uses_block else ""
        return self.datatype + block + ("+zp" if family.uses_center and self.has_zero_point else "")

    def __str__(self) -> str:
        if self.is_left_alone:
            return "fp16"
        exponent = "" if self.exponent is None else f"e{self.exponent}"
        flags = ("+zp" if self.has_zero_point else "") + ("+dq" if self.has_double_quant else "")
        flags += f"+sb{self.scale_bits}" if self.scale_bits else ""
        if self.outliers:
            flags += f"+out{self.outliers:.12g}%"
        if self.variant:
            flags += f"+{self.variant}"
        flags += "+a8" if self.has_int8_inputs else ""
        return f"{self.family}{self.bits}{exponent}:{self.block}{flags}"

    def outlier_count(self, in_features: int) -> int:
        """Input features kept at 16 bits: at least one when any share was asked for."""
        if not self.outliers:
            return 0
        return min(in_features, max(1, round(in_features * self.outliers / 100)))


LEFT_ALONE = Spec("fp16", 16)


def parse(text: str) -> Spec:
    """The spec that a string names.

    >>> spec = parse("int3:128+zp")
    >>> spec.family, spec.bits, spec.block, spec.has_zero_point
    ('int', 3, 128, True)
    >>> str(parse("nf4"))
    'nf4:64'

    Raises:
        UsageError: not a spec, or a format that kbitc does not have.
    """
    head, *flags = text.strip().split("+")
    if head == "fp16" and not flags:
        return LEFT_ALONE
    match = _PATTERN.fullmatch(head)
    if match is None:
        raise UsageError(f"'{text}' is not a spec; write one like {EXAMPLES}")
    options: dict[str, bool | int | float | str] = {}
    for flag in flags:
        key, value = _parse_flag(text, flag)
        if key in options:
            raise UsageError(f"'{text}': +{flag} is given twice; name each flag once")
        options[key] = value
    exponent = match["exponent"]
    return Spec(
        family=match["family"],
        bits=int(match["bits"]),
        block=DEFAULT_BLOCK if match["block"] is None else int(match["block"]),
        exponent=None if exponent is None else int(exponent),
        **options,  # type: ignore[arg-type]  # keys and value types come from _parse_flag
    )


@dataclass(frozen=True)
class Wish:
    """What a plan may ask for: a format, and those outlier features at 16 bits that are found.

    Attributes:
        spec: without ``+out``.
        keeps_outliers: ``+out`` without a share, which ``apply_plan`` makes a share of, weight by weight.
    """

    spec: Spec
    keeps_outliers: bool = False

    def __str__(self) -> str:
        return f"{self.spec}+out" if self.keeps_outliers else str(self.spec)


def parse_wish(text: str) -> Wish:
    """The wish that a string names; ``parse_wish(str(wish)) == wish``.

    >>> str(parse_wish("int8:64+out+dq"))
    'int8:64+dq+out'

    Raises:
        UsageError: as :func:`parse`, or ``+out`` twice.
    """
    head, *flags = text.strip().split("+")
    rest = [flag for flag in flags if flag != "out"]
    if len(rest) == len(flags):
        return Wish(parse(text))
    spec = parse("+".join([head, *rest]))
    if len(flags) - len(rest) > 1 or spec.outliers:
        raise UsageError(f"'{text}': +out is given twice; name it once, with a share or without")
    if spec.is_left_alone:
        raise UsageError(f"'{text}': fp16 keeps every feature at 16 bits; leave +out away")
    return Wish(spec, keeps_outliers=True)


def _parse_flag(text: str, flag: str) -> tuple[str, bool | float | str]:
    if flag == "zp":
        return "has_zero_point", True
    if flag == "dq":
        return "has_double_quant", True
    if flag == "a8":
        return "has_int8_inputs", True
    if flag == "out":
        raise UsageError(
            f"'{text}': +out means the outlier features that are found in compiling a model; name a share "
            "here, for example +out1%"
        )
    if flag in OF_STUDIES:
        raise UsageError(
            f"'{text}': +{flag} is of studies alone ('kbitc sweep'), which store nothing: no packed weight "
            "has it; +zp centres each block, and blocks that are packed lie within a row"
        )
    scales = _SCALES.fullmatch(flag)
    if scales is not None:
        return "scale_bits", int(scales["bits"])
    outliers = _OUTLIERS.fullmatch(flag)
    if outliers is not None:
        return "outliers", float(outliers["percent"])
    variants = {name for known in datatypes.families().values() for name in known.variants}
    if flag in variants:
        return "variant", flag
    raise UsageError(
        f"'{text}': " + did_you_mean("flag", flag, ["zp", "dq", "sb6", "a8", "out", "outP%", *variants])
    )
