"""The exponential in integers: its parabolas, its error, its bounds, and all that is made of it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.exponential import (
    ANCHORED,
    LARGEST,
    MINIMAX,
    OCTAVE,
    Mode,
    Parabola,
    _to_octaves,
    decay,
    exp,
    peak,
    tabled,
)
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=100)
MODES: tuple[Mode, ...] = ("poly", "paper", "lut")
SCALES = [2.0**-20, 1e-4, 10 / 32767, 2.0**-8, 10 / 127, 0.5, 0.7, 4.0, 16.0]
scales = st.floats(-20, 4).map(lambda exponent: 2.0**exponent)
POLYNOMIAL = 1.238e-3
ROUNDING = (
    math.log(2) / 2 ** (OCTAVE + 1)  # the distance, half a step
    + 0.37 * 3.2e-5  # the multiplier: x exp(-x) <= 0.37
    + math.log(2) / 2 ** (OCTAVE + 1)  # the vertex, times the slope, at most 1
    + 2**16 / 1.5e9  # the peak
    + 2.0**-29  # the last division
)


def points() -> np.ndarray:
    return np.linspace(-math.log(2), 0, 4001)


def value(parabola: Parabola, p: np.ndarray) -> np.ndarray:
    found: np.ndarray = parabola.a * (p + parabola.b) ** 2
    return found + parabola.at_zero - parabola.a * parabola.b**2


def alternations(error: np.ndarray, largest: float) -> int:
    """How often the error goes from one extreme, nearly, to the other, plus one."""
    signs = np.sign(error[np.abs(error) > 0.999 * largest])
    return int(np.count_nonzero(np.diff(signs))) + 1


def test_the_parabola_has_the_least_largest_error() -> None:
    """Chebyshev: three coefficients are best when the error alternates between four extremes."""
    error = value(MINIMAX, points()) - np.exp(points())
    assert np.abs(error).max() == pytest.approx(POLYNOMIAL, rel=1e-3)
    assert alternations(error, np.abs(error).max()) == 4


def test_the_anchored_parabola_has_the_least_relative_error() -> None:
    error = value(ANCHORED, points()) / np.exp(points()) - 1
    assert error[-1] == pytest.approx(0, abs=1e-9)
    assert np.abs(error).max() == pytest.approx(2.214e-3, rel=1e-3)
    assert alternations(error, np.abs(error).max()) == 3


@pytest.mark.parametrize("parabola", [MINIMAX, ANCHORED])
def test_the_constants_in_steps_fit_31_bits(parabola: Parabola) -> None:
    assert 1 << OCTAVE < parabola.vertex < 1 << (OCTAVE + 1)
    assert parabola.peak % (1 << 17) == 0
    assert 1 << 30 <= parabola.peak < 1 << 31
    lowest = (parabola.vertex - (1 << OCTAVE) + 1) ** 2 + parabola.peak - parabola.vertex**2
    assert 0 < lowest < parabola.peak


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("largest", [255, LARGEST])
def test_the_error_over_all_inputs_is_the_parabolas_and_the_roundings(
    scale: float, largest: int
) -> None:
    q = np.arange(-largest, 1)
    e, step = exp(q, scale)
    assert np.abs(e * step - np.exp(q * scale)).max() <= POLYNOMIAL + ROUNDING
    assert POLYNOMIAL + ROUNDING < 1.4e-3


def test_distances_in_octaves_fit_32_bits_and_reach_the_end() -> None:
    for scale in np.exp2(np.arange(-60, 20, 0.03)).tolist():
        multiplier, shift, limit = _to_octaves(scale)
        assert limit * multiplier + (1 << (shift - 1)) < 1 << 31
        assert limit == LARGEST or decay(np.array(limit), scale)[0] == 0


def test_steps_are_rounded_to_the_nearest() -> None:
    """Against the same parabola in float64: half a step, and the rounding of the constants."""
    scale = 10 / 32767
    x = np.arange(32768) * scale
    z = np.floor(x / math.log(2))
    real = value(ANCHORED, z * math.log(2) - x) / 2**z
    e, step = decay(np.arange(32768), scale)
    slope = math.log(2) / 2**OCTAVE  # per step, at most
    assert np.abs(e * step - real).max() < 0.75 * slope
    assert abs(np.mean(e * step - real)) < 0.1 * slope


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("parabola", [MINIMAX, ANCHORED])
def test_it_falls(scale: float, parabola: Parabola) -> None:
    e, _ = decay(np.arange(LARGEST + 1), scale, "poly", parabola)
    assert np.diff(e).max() <= 0
    assert e[0] == parabola.peak // 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [*SCALES, 2.0**-60, 1e6])
def test_far_below_the_maximum_it_is_exactly_0(mode: Mode, scale: float) -> None:
    if mode == "paper" and scale > math.log(2):
        return
    q = np.arange(256)
    e, step = decay(q, scale, mode)
    assert peak(scale, mode) == e[0] == e.max()
    assert 1 << 29 <= e[0] < 1 << 30
    assert (e[q * scale > 31 * math.log(2) + scale] == 0).all()
    assert mode == "paper" or e[0] * step == pytest.approx(1, rel=1e-15)


def test_the_relative_error_stays_down_to_small_values() -> None:
    scale = 10 / 32767
    q = np.arange(32768)
    e, step = decay(q, scale)
    relative = np.abs(e * step / np.exp(-q * scale) - 1)
    # One in e >= 2^29 / exp(10) from the last division, and x times the multiplier's error.
    assert relative.max() < 2.214e-3 + ROUNDING + 10 * 3.2e-5 + math.exp(10) / 2**29


@pytest.mark.parametrize("mode", MODES)
def test_positive_inputs_count_as_0(mode: Mode) -> None:
    e, _ = exp(np.array([-1, 0, 1, 255]), 0.25, mode)
    assert e[0] < e[1] == e[2] == e[3]


@pytest.mark.parametrize("scale", [2.0**-12, 10 / 127, 0.5, math.log(2)])
def test_paper_mode_is_the_published_algorithm(scale: float) -> None:
    """I-BERT, algorithm 2, one element at a time; brought to 30 bits by a shift."""
    e, step = exp(np.arange(-255, 1), scale, "paper")
    a, b, c = 0.3585, 1.353, 0.344
    up = round(math.log2(a * scale**2 / step))
    for q, found in zip(range(-255, 1), e.tolist(), strict=True):
        q_ln2 = math.floor(math.log(2) / scale)
        z = -q // q_ln2
        p = q + z * q_ln2
        polynomial = (p + math.floor(b / scale)) ** 2 + math.floor(c / (a * scale**2))
        assert found == (polynomial >> z) << up


@pytest.mark.parametrize("scale", [2.0**-20, 1e-4, 10 / 32767, 2.0**-8, 10 / 127, 0.3])
def test_paper_mode_is_off_by_about_a_step(scale: float) -> None:
    q = np.arange(-LARGEST, 1)
    e, step = exp(q, scale, "paper")
    assert np.abs(e * step - np.exp(q * scale)).max() <= 2.13e-3 + scale


def test_paper_mode_takes_the_finest_scales_for_one_that_fits() -> None:
    q = np.arange(-LARGEST, 1)
    e, step = exp(q, 2.0**-60, "paper")
    assert np.abs(e * step - 1).max() < 2.13e-3 + LARGEST * 2.0**-28


def test_paper_mode_refuses_steps_above_ln_2() -> None:
    with pytest.raises(IntqError, match=r"steps of 0\.7; expected at most ln 2 .* use mode poly"):
        exp(np.zeros(1, np.int64), 0.7, "paper")


@pytest.mark.parametrize("scale", SCALES)
def test_tables_are_exact(scale: float) -> None:
    q = np.arange(-255, 1)
    e, step = exp(q, scale, "lut")
    assert np.abs(e * step - np.exp(q * scale)).max() <= step / 2 * (1 + 1e-9)


def test_a_table_takes_wide_inputs_only_where_it_has_come_down_to_0() -> None:
    assert tabled(np.array([0, 21, LARGEST]), 1.0, 1 << 29).tolist() == [1 << 29, 0, 0]
    with pytest.raises(IndexError):
        tabled(np.array([256]), 0.01, 1 << 29)


@law
@given(scale=scales, q=st.lists(st.integers(0, LARGEST), min_size=1, max_size=8))
def test_the_published_constants_lose_nothing_to_overflow(scale: float, q: list[int]) -> None:
    """Python's integers do not overflow: the same algorithm on them gives the same."""
    scale = min(scale, math.log(2))
    ln2, b = math.floor(math.log(2) / scale), math.floor(1.353 / scale)
    c = math.floor(0.344 / (0.3585 * scale**2))
    exact = [((d // ln2 * ln2 - d + b) ** 2 + c) >> d // ln2 for d in q]
    up = 30 - (b * b + c).bit_length()
    expected = [e << up if up >= 0 else e >> -up for e in exact]
    assert decay(np.array(q), scale, "paper")[0].tolist() == expected


@law
@given(scale=st.floats(-60, 20).map(lambda exponent: 2.0**exponent))
def test_polynomials_lose_nothing_to_overflow(scale: float) -> None:
    """The steps of mode poly, on Python's integers, at the extremes."""
    for distance in (0, 1, 2, 255, 256, 32768, LARGEST):
        e, step = decay(np.array([distance]), scale)
        real = math.exp(-distance * scale)
        assert abs(int(e[0]) * step - real) <= 1.91e-3 + ROUNDING
