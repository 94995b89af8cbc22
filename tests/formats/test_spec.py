"""Spec strings: they round-trip, and errors say what to write instead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbitc.errors import UsageError
from kbitc.formats.datatypes import FAMILIES
from kbitc.formats.spec import LEFT_ALONE, Spec, parse


@st.composite
def specs(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    bits = draw(st.integers(2, 8))
    exponent = draw(st.none() | st.integers(1, bits - 1)) if family == "fp" else None
    has_zero_point = draw(st.booleans())
    variants = [
        name
        for name, variant in FAMILIES[family].variants.items()
        if bits in (variant.bits or (bits,)) and variant.is_centered in (None, has_zero_point)
    ]
    variant = draw(st.sampled_from(["", *variants]))
    is_gridded = draw(st.booleans()) and (not has_zero_point or variant == "min")
    return Spec(
        family,
        bits,
        block=draw(st.sampled_from([1, 16, 32, 128]) if is_gridded else st.integers(1, 5000)),
        exponent=exponent,
        has_zero_point=has_zero_point,
        has_double_quant=draw(st.booleans()) and not is_gridded and variant != "iz",
        scale_bits=draw(st.integers(4, 8)) if is_gridded else 0,
        outliers=draw(st.sampled_from([0.0, 0.5, 1.0, 2.25, 33.0])),
        variant=variant,
    )


@given(specs())
def test_spec_strings_round_trip(spec):
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "nf4:64",
        "int3:128+zp",
        "fp4e2:64+dq",
        "nf3:64+out0.5%",
        "fp16",
        "fp4:64+paper",
        "quantile4:64+paper",
        "sint3:16+sb6",
        "int4:32+zp+sb6+out1%+min",
        "sint4:32+sb6+nl",
    ],
)
def test_documented_specs_are_their_own_names(text):
    assert str(parse(text)) == text


def test_block_defaults_to_64():
    assert parse("nf4") == parse("nf4:64")


def test_fp16_is_left_alone():
    assert parse("fp16") is LEFT_ALONE
    assert LEFT_ALONE.is_left_alone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf9:64", "9 bits"),
        ("int1:64", "1 bits"),
        ("nf4:0", "block size 0"),
        ("nf4:-3", "block size -3"),
        ("nff4:64", "did you mean 'nf'"),
        ("nf4:64+zq", "no flag 'zq'"),
        ("nf4:64+zp+zp", "twice"),
        ("nf4e2:64", "only fp takes exponent bits"),
        ("fp4e4:64", "1 to 3"),
        ("nf4:64+paper", "no nf variant"),
        ("nf4:64+out100%", "outlier share"),
        ("4", "is not a spec"),
        ("", "is not a spec"),
        ("nf4:64+", "no flag"),
    ],
)
def test_bad_specs_say_why(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)
