"""Codebooks against published values and independent constructions."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import UsageError
from kbitc.formats import datatypes
from kbitc.formats.datatypes import FAMILIES, CodebookRequest, codebook

# QLoRA's table (bitsandbytes functional.py, get_4bit_type).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
# BOF4-S (MSE), table 7 of the BOF4 paper, block 64.
BOF4 = [
    -0.8568463921546936, -0.6692874431610107, -0.5235266089439392, -0.4004882574081421,
    -0.2910638153553009, -0.1900092959403992, -0.0938529595732689, 0, 0.0887671709060669,
    0.1794802695512772, 0.2743096053600311, 0.3760197460651398, 0.4886530041694641,
    0.6188603639602661, 0.7791395783424377, 1,
]  # fmt: skip

UNFITTED = [name for name, family in FAMILIES.items() if not family.is_fitted]


def sample_blocks(seed=0):
    values = np.random.default_rng(seed).standard_normal((256, 64))
    scale = np.abs(values).max(axis=1, keepdims=True)
    weight = np.broadcast_to(scale**2, values.shape)
    return datatypes.Blocks(values.ravel(), (values / scale).ravel(), weight.ravel())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_centered", [False, True])
def test_every_codebook_is_sorted_distinct_and_in_range(name, bits, is_centered):
    levels = codebook(name, CodebookRequest(bits=bits, is_centered=is_centered, blocks=sample_blocks()))
    assert len(levels) <= 2**bits
    assert (np.diff(levels) > 0).all()
    assert np.abs(levels).max() <= 1.0
    assert (levels == levels.astype(np.float32)).all()
    if name != "quantile":
        # Every type but the medians holds an end of the range; with centring a block has both ends.
        assert np.abs(levels).max() > 0.95 or name == "learned"
    if not (name in ("int", "sint") and is_centered):
        assert 0.0 in levels


def test_nf4_is_qloras():
    assert np.abs(codebook("nf", CodebookRequest(bits=4)) - NF4).max() < 1e-6


def test_nf2_and_nf3_follow_the_same_rule():
    assert np.allclose(codebook("nf", CodebookRequest(bits=2)), [-1, 0, 0.435818, 1], atol=1e-6)
    nf3 = [-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1]
    assert np.allclose(codebook("nf", CodebookRequest(bits=3)), nf3, atol=1e-6)


def test_fp4_e2m1_is_the_ocp_grid():
    positive = [value for value in codebook("fp", CodebookRequest(bits=4, exponent=2)) if value >= 0]
    assert np.allclose(positive, np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6, atol=1e-7)


@pytest.mark.parametrize(
    ("variant", "smallest"), [("", 1 / 12), ("half", 0.020833333), ("paper", 0.005208333)]
)
def test_fp4_variants_differ_in_subnormals_alone(variant, smallest):
    levels = codebook("fp", CodebookRequest(bits=4, exponent=2, variant=variant))
    assert min(value for value in levels if value > 0) == pytest.approx(smallest)
    ieee = codebook("fp", CodebookRequest(bits=4, exponent=2))
    assert np.allclose([v for v in levels if v > 0.1], [v for v in ieee if v > 0.1])


def test_fp_widths_of_the_paper():
    best = [codebook("fp", CodebookRequest(bits=k)) for k in range(3, 9)]
    named = [
        codebook("fp", CodebookRequest(bits=k, exponent=e)) for k, e in zip(range(3, 9), (2, 2, 3, 3, 4, 4))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(best, named, strict=True))
    main = codebook("fp", CodebookRequest(bits=4, variant="paper"))
    assert np.allclose([v for v in main if v > 0], [2.0**-i for i in range(6, -1, -1)])  # E3M0


def test_fp_without_mantissa_is_powers_of_two_and_without_exponent_range_is_integer():
    assert [v for v in codebook("fp", CodebookRequest(bits=3, exponent=2)) if v >= 0] == [0, 0.25, 0.5, 1]
    e1m2 = codebook("fp", CodebookRequest(bits=4, exponent=1))
    assert np.allclose(e1m2, np.arange(-7, 8) / 7)


def test_dynamic_8_bit_is_the_block_wise_papers():
    """Independent construction: sign, leading zeros as a decimal exponent, an indicator, a fraction."""
    positive = []
    for zeros in range(7):
        fraction_bits = 7 - 1 - zeros
        edges = [0.1 + 0.9 * i / 2**fraction_bits for i in range(2**fraction_bits + 1)]
        positive += [10.0**-zeros * (a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    expected = sorted([-v for v in positive] + [0.0] + positive + [1.0])
    assert len(expected) == 256
    assert np.allclose(codebook("dynamic", CodebookRequest(bits=8)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("bits", "positive"),
    [(2, [0.55]), (3, [0.055, 0.325, 0.775]), (4, [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875])],
)
def test_dynamic_at_few_bits(bits, positive):
    expected = [-v for v in reversed(positive)] + [0, *positive, 1]
    assert np.allclose(codebook("dynamic", CodebookRequest(bits=bits)), expected, rtol=1e-6)


def test_bof4_is_the_papers():
    assert np.abs(codebook("bof", CodebookRequest(bits=4, block=64)) - BOF4).max() < 5e-4
    bof3 = [-0.710749, -0.419906, -0.198252, 0, 0.179606, 0.376256, 0.619187, 1]
    assert np.allclose(codebook("bof", CodebookRequest(bits=3, block=64)), bof3, atol=5e-4)
    assert np.allclose(
        codebook("bof", CodebookRequest(bits=2, block=64)), [-0.445587, 0, 0.377406, 1], atol=5e-4
    )


def test_bof4_depends_on_the_block_size():
    assert codebook("bof", CodebookRequest(bits=4, block=32))[0] == pytest.approx(-0.87328, abs=1e-3)
    assert codebook("bof", CodebookRequest(bits=4, block=256))[0] == pytest.approx(-0.81468, abs=1e-3)


def test_int_levels():
    assert np.allclose(codebook("int", CodebookRequest(bits=4)), np.arange(-7, 8) / 7)
    assert np.allclose(codebook("int", CodebookRequest(bits=4, is_centered=True)), np.arange(16) / 7.5 - 1)


def test_quantile_levels_have_equal_mass():
    blocks = sample_blocks()
    levels = codebook("quantile", CodebookRequest(bits=4, blocks=blocks))
    bounds = (levels[1:] + levels[:-1]) / 2
    mass = np.bincount(np.searchsorted(bounds, blocks.normalized), minlength=16) / blocks.normalized.size
    # Medians of equal cells; the level nearest to 0 is moved there, the tails are wider than the cells.
    assert np.abs(mass[2:-2] - 1 / 16).max() < 0.02


def test_quantile_of_the_paper_keeps_its_wasted_level():
    levels = codebook("quantile", CodebookRequest(bits=2, variant="paper", blocks=sample_blocks()))
    middle = levels[1:-1]
    assert np.abs(middle).max() < 0.05  # the added 0 and the median stand side by side
    assert np.abs(levels).max() == 1.0


def test_learned_beats_every_fixed_type_on_its_own_tensor():
    blocks = sample_blocks(3)

    def error(levels):
        bounds = (levels[1:] + levels[:-1]) / 2
        nearest = levels[np.searchsorted(bounds, blocks.normalized)]
        return (blocks.weight * (blocks.normalized - nearest) ** 2).sum()

    own = error(codebook("learned", CodebookRequest(bits=4, blocks=blocks)))
    for name in ("int", "fp", "nf", "dynamic"):
        assert own < error(codebook(name, CodebookRequest(bits=4)))


def test_fitted_types_ask_for_a_tensor():
    with pytest.raises(UsageError, match="fitted to a tensor"):
        codebook("learned", CodebookRequest(bits=4))


def test_unknown_family_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'dynamic'"):
        datatypes.find_family("dynamics")
