"""Softmax, attention and log-softmax in integers: error, sums, long rows, exact rounding."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.exponential import LARGEST, Mode, decay, peak
from onnx_intq.kernels.softmax import LOGARITHM, log_softmax, softmax, softmax_matmul
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=200)
Kernel = Callable[..., tuple[np.ndarray, float]]
MODES: tuple[Mode, ...] = ("poly", "paper", "lut")
SCALES = [2.0**-20, 10 / 32767, 2.0**-8, 10 / 127, 0.5, 1.0, 16.0]
modes = st.sampled_from(MODES)
scales = st.floats(-20, 4).map(lambda exponent: 2.0**exponent)
RELATIVE = 2.214e-3 + 1.1e-4
"""exp, relative: the anchored parabola and its roundings, derived in test_exponential.py."""


def logits(width: int, bits: int, rows: int = 40, spread: float = 2.5) -> tuple[np.ndarray, float]:
    """Normally distributed, on a signed grid of `bits`: [rows, width] and the scale."""
    x = np.random.default_rng(width).normal(0, spread, (rows, width))
    scale = float(np.abs(x).max()) / ((1 << (bits - 1)) - 1)
    return np.rint(x / scale).astype(np.int64), scale


def real_log_softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    below = x - x.max(axis=axis, keepdims=True)
    found: np.ndarray = below - np.log(np.exp(below).sum(axis=axis, keepdims=True))
    return found


def tolerance(p: np.ndarray, relative: float, bits: int = 15) -> np.ndarray:
    """p (1 - p) times the spread of exp's relative errors; divisor and quotient rounded."""
    found: np.ndarray = 2 * relative * p * (1 - p) + p * 2.0 ** (bits - 30) + 2.0**-bits / 2
    return found + 1e-9


@pytest.mark.parametrize("width", [1, 2, 29, 250, 3000])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("spread", [0.5, 2.5, 8.0])
def test_softmax_of_polynomials(width: int, bits: int, spread: float) -> None:
    q, scale = logits(width, bits, spread=spread)
    real = np.exp(real_log_softmax(q * scale))
    found, step = softmax(q, scale)
    assert (np.abs(found * step - real) <= tolerance(real, RELATIVE)).all()
    assert np.abs(found * step - real).max() < 1.3e-3 < 2.5e-3


@pytest.mark.parametrize("width", [1, 2, 29, 250])
@pytest.mark.parametrize("scale", SCALES)
def test_softmax_of_tables(width: int, scale: float) -> None:
    q, _ = logits(width, 8)
    real = np.exp(real_log_softmax(q * scale))
    found, step = softmax(q, scale, mode="lut")
    assert (np.abs(found * step - real) <= tolerance(real, 2.0**-29)).all()


def test_softmax_of_the_published_constants_needs_16_bits() -> None:
    q, scale = logits(250, 16)
    found, step = softmax(q, scale, mode="paper")
    assert np.abs(found * step - np.exp(real_log_softmax(q * scale))).max() < 2e-3
    q, scale = logits(250, 8)
    found, step = softmax(q, scale, mode="paper")
    assert np.abs(found * step - np.exp(real_log_softmax(q * scale))).max() > 2e-2


@pytest.mark.parametrize("bits", [8, 15, 16])
def test_softmax_is_rounded_half_up_by_a_rounded_divisor(bits: int) -> None:
    q, scale = logits(7, 8)
    e, _ = decay(q.max(-1, keepdims=True) - q, scale)
    found, _ = softmax(q, scale, bits=bits)
    for row, exponentials in zip(found.tolist(), e.tolist(), strict=True):
        divisor = math.floor(Fraction(sum(exponentials), 1 << bits) + Fraction(1, 2))
        half = divisor // 2
        assert row == [(x + half) // divisor for x in exponentials]


@pytest.mark.parametrize("bits", [1, 8, 15, 16])
@pytest.mark.parametrize("mode", ["poly", "lut"])
def test_one_element_that_has_all_gets_exactly_1(bits: int, mode: Mode) -> None:
    q = np.array([[-127, 127, -127], [0, 0, 0]])
    found, step = softmax(q, 0.5, mode=mode, bits=bits)
    assert found[0].tolist() == [0, 1 << bits, 0]
    assert found[0, 1] * step == 1
    assert (found[1] == found[1, 0]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [2, 29, 250])
def test_rows_add_up_to_1(mode: Mode, width: int) -> None:
    q, scale = logits(width, 8)
    found, step = softmax(q, scale, mode=mode)
    off = np.abs(found.sum(axis=-1) * step - 1)
    assert off.max() <= width * step / 2 + 2.0**-14


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_any_axis(function: Kernel) -> None:
    q, scale = logits(30, 8)
    q = q[:12].reshape(3, 4, 30)
    expected, _ = function(q, scale, -1)
    found, _ = function(np.moveaxis(q, -1, 0), scale, -3)
    np.testing.assert_array_equal(np.moveaxis(found, 0, -1), expected)
    found, _ = function(np.swapaxes(q, 1, 2), scale, -2)
    np.testing.assert_array_equal(np.swapaxes(found, 1, 2), expected)


def test_the_order_of_a_row_is_kept() -> None:
    q, scale = logits(250, 16, rows=1)
    order = np.argsort(q[0], kind="stable")
    for function in (softmax, log_softmax):
        assert np.diff(function(q, scale)[0][0][order]).min() >= 0


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_rows(mode: Mode) -> None:
    """65,536 equal elements: the sum is 2^16 times the peak, the largest there is."""
    q = np.full((1, 1 << 16), 100)
    found, step = softmax(q, 0.1, mode=mode, bits=16)
    assert (found == 1).all()
    assert step == 2.0**-16
    found, step = log_softmax(q, 0.1, mode=mode)
    np.testing.assert_allclose(found * step, -16 * math.log(2), atol=1e-4)
    v = np.full((1 << 16, 2), -255)
    y = softmax_matmul(q, 0.1, v, 100, zero_point=0, low=-32768, high=32767, mode=mode)
    assert (y == -25500).all()
    v = -v
    y = softmax_matmul(q, 0.1, v, 2**-4, zero_point=65500, low=0, high=65535, mode=mode)
    assert (y == 65516).all()
    v = np.full((1 << 16, 2), -32896)
    ends: dict[str, Any] = {"zero_point": 65535, "low": 0, "high": 65535}
    ends |= {"mode": mode, "v_bits": 16}
    assert (softmax_matmul(q, 0.1, v, 1, v_zero_point=32639, **ends) == 0).all()
    assert (softmax_matmul(q, 0.1, -v - 257, 1, v_zero_point=-32896, **ends) == 65535).all()
    assert (softmax_matmul(q, 0.1, v, 2**-8, v_zero_point=32639, **ends) == 65535 - 256).all()


def test_the_logarithms_polynomial_is_best() -> None:
    """Exact at both ends, three free coefficients: the error alternates between four extremes."""
    u = np.linspace(0, 1, 4001)
    error = sum(c * u**n for n, c in enumerate(LOGARITHM, 1)) - np.log1p(u)
    assert isinstance(error, np.ndarray)
    largest = np.abs(error).max()
    assert largest == pytest.approx(7.84e-5, rel=1e-2)
    assert error[[0, -1]] == pytest.approx([0, 0], abs=1e-8)
    signs = np.sign(error[np.abs(error) > 0.99 * largest])
    assert np.count_nonzero(np.diff(signs)) == 3


@pytest.mark.parametrize("width", [1, 2, 29, 1025])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, *SCALES])
@pytest.mark.parametrize("mode", ["poly", "lut"])
def test_log_softmax(width: int, scale: float, mode: Mode) -> None:
    q, _ = logits(width, 8)
    found, step = log_softmax(q, scale, mode=mode)
    relative = RELATIVE if mode == "poly" else 2.0**-29
    # The polynomial, the ratio's and the mantissa's floors, the steps of 2^-24, the last rounding.
    tolerance = relative + 7.9e-5 + 2.0**-15 + 2.0**-22 + step / 2 + 255 * 2.0**-50
    real = real_log_softmax(q * scale)
    assert np.abs(found * step - real).max() <= tolerance + (step if scale < 2.0**-24 else 0)
    assert found.max() <= 0
    assert step <= max(2.0**-14, scale * 2.0**-14)


@pytest.mark.parametrize("bits", [8, 16])
def test_log_softmax_of_16_bits_and_the_published_constants(bits: int) -> None:
    q, scale = logits(250, 16)
    found, step = log_softmax(q, scale)
    assert np.abs(found * step - real_log_softmax(q * scale)).max() < 2.5e-3
    found, step = log_softmax(q, scale, mode="paper")
    assert np.abs(found * step - real_log_softmax(q * scale)).max() < 4e-3


def test_a_certain_element_has_log_probability_0() -> None:
    found, _ = log_softmax(np.array([[127, -128, -128]]), 0.5)
    assert found[0, 0] == 0


def test_an_axis_counted_from_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="axis 1; expected one counted from the end"):
        log_softmax(np.zeros((2, 2), np.int64), 0.1, 1)


def attention(
    q: np.ndarray, scale: float, v: np.ndarray, multiplier: float, mode: Mode = "poly"
) -> np.ndarray:
    found: np.ndarray = softmax_matmul(
        q, scale, v, multiplier, zero_point=0, low=-32768, high=32767, mode=mode
    )
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("v_bits", [8, 16])
def test_attention_is_rounded_once(mode: Mode, v_bits: int) -> None:
    """Equal to the quotient of integers, rounded half up in exact arithmetic."""
    q, scale = logits(29, 8, rows=6)
    v = np.random.default_rng(1).integers(-(1 << v_bits >> 1), (1 << v_bits >> 1) - 128, (29, 5))
    e, _ = decay(q.max(-1, keepdims=True) - q, scale, mode)
    w = np.floor(e * 255 / peak(scale, mode) + 0.5).astype(np.int64)
    multiplier, zero_point, v_zero_point = 0.75, -20, 7
    y = softmax_matmul(
        q,
        scale,
        v,
        multiplier,
        v_zero_point=v_zero_point,
        v_bits=v_bits,
        zero_point=zero_point,
        low=-(1 << v_bits >> 1),
        high=(1 << v_bits >> 1) - 1,
        mode=mode,
    )
    ends = -(1 << v_bits >> 1), (1 << v_bits >> 1) - 1
    for row, column in np.ndindex(y.shape):
        numerator = int(w[row] @ (v[:, column] - v_zero_point))
        real = Fraction(numerator, int(w[row].sum())) * Fraction(multiplier) + zero_point
        assert y[row, column] == min(max(math.floor(real + Fraction(1, 2)), ends[0]), ends[1])


@pytest.mark.parametrize(("spread", "bound"), [(0.5, 2e-3), (1.0, 5e-3), (2.5, 2.6e-2)])
def test_late_normalisation_beats_8_bit_probabilities(spread: float, bound: float) -> None:
    """Small probabilities survive: 250 keys, the relative root mean square of the output's error.

    8 bits of a row's maximum are off by 0.3 of a step, whatever the maximum's probability is.
    """
    q, scale = logits(250, 8, spread=spread)
    v = np.random.default_rng(1).integers(-100, 128, (250, 64))
    real = np.exp(real_log_softmax(q * scale)) @ v * 64.0

    def off(y: np.ndarray) -> float:
        return float(np.sqrt(np.square(y - real).mean() / np.square(real).mean()))

    early, _ = softmax(q, scale, bits=8)
    assert off(attention(q, scale, v, 64.0)) < bound
    assert off(attention(q, scale, v, 64.0)) < off((early @ v) / 256 * 64.0) / 1.5


def test_batches_of_heads() -> None:
    q, scale = logits(20, 8, rows=24)
    q = q.reshape(2, 3, 4, 20)
    v = np.random.default_rng(1).integers(-128, 128, (2, 3, 20, 8))
    found = attention(q, scale, v, 2.0)
    assert found.shape == (2, 3, 4, 8)
    np.testing.assert_array_equal(found[1, 2], attention(q[1, 2], scale, v[1, 2], 2.0))


@pytest.mark.parametrize("multiplier", [-1.0, 65537.0, math.nan])
def test_multipliers_out_of_range_are_refused(multiplier: float) -> None:
    with pytest.raises(IntqError, match="expected a ratio of scales from 0 to 65536"):
        attention(np.zeros((1, 1), np.int64), 0.1, np.zeros((1, 1), np.int64), multiplier)


@law
@given(
    mode=modes,
    scale=scales,
    row=st.lists(st.integers(0, LARGEST), min_size=1, max_size=20),
    bits=st.integers(1, 16),
)
def test_results_stay_in_their_bounds(mode: Mode, scale: float, row: list[int], bits: int) -> None:
    scale = min(scale, math.log(2)) if mode == "paper" else scale
    q = np.array(row) % (256 if mode == "lut" else LARGEST + 1)
    found, _ = softmax(q, scale, mode=mode, bits=bits)
    assert found.min() >= 0
    assert found.max() <= (1 << bits) + (1 << max(0, bits - 13)) * (mode == "paper")
    logarithms, step = log_softmax(q, scale, mode=mode)
    assert -(1 << 31) < logarithms.min() <= logarithms.max() <= 0
    assert logarithms.max() * step >= -math.log(len(row)) - 0.01


@law
@given(
    multiplier=st.floats(0, 65536),
    scale=scales,
    v=st.lists(st.integers(-255, 255), min_size=1, max_size=20),
    v_zero_point=st.integers(-255, 255),
    grid=st.sampled_from([(-128, 127), (0, 255), (-32768, 32767), (0, 65535)]),
    place=st.floats(0, 1),
)
def test_attention_at_the_extremes(
    multiplier: float,
    scale: float,
    v: list[int],
    v_zero_point: int,
    grid: tuple[int, int],
    place: float,
) -> None:
    """Equal elements: the mean of v on the grid, within the multiplier's rounding."""
    low, high = grid
    zero_point = round(low + place * (high - low))
    q = np.full((1, len(v)), LARGEST)
    y = softmax_matmul(
        q,
        scale,
        np.array(v)[:, None],
        multiplier,
        v_zero_point=v_zero_point,
        zero_point=zero_point,
        low=low,
        high=high,
    )
    real = (np.mean(v) - v_zero_point) * multiplier + zero_point
    fraction = min(37 - (zero_point - low).bit_length(), 29 - math.frexp(multiplier)[1])
    tolerance = 0.5 + 510 * 2.0 ** -(fraction + 1) + 1e-6 * abs(real)
    assert abs(y.item() - np.clip(real, low, high)) <= tolerance
