"""Sigmoid, tanh, swish and GLU in integers: error, symmetry, order, bounds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.exponential import LARGEST, Mode
from onnx_intq.kernels.sigmoid import glu, sigmoid, swish, tanh
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=200)
SCALES = [2.0**-20, 10 / 32767, 2.0**-8, 10 / 127, 0.3, 1.0, 16.0]
modes = st.sampled_from(["poly", "paper", "lut"])
scales = st.floats(-20, 4).map(lambda exponent: 2.0**exponent)
POLYNOMIAL = 5.5e-4
"""Of e / (1 + e), e off by the anchored parabola's error (below)."""
EXPONENTIAL = 1.1e-4
"""Roundings of exp, derived in test_exponential.py."""
ROUNDING = EXPONENTIAL / 4 + 2**-14 / 2 + 2**-17
"""d sigmoid / d e is 1/4 to 1 where e is 1 to 0, the divisor's rounding, the quotient's."""


def real_sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    found: np.ndarray = np.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return found


def inputs(bits: int) -> np.ndarray:
    """Also those of a grid whose zero point is at its end."""
    largest = (1 << bits) - 1
    return np.arange(-largest, largest + 1)


def test_the_polynomials_error() -> None:
    p = np.linspace(-math.log(2), 0, 4001)
    e = 0.361182804 * (p + 1.342953015) ** 2 + 1 - 0.361182804 * 1.342953015**2
    assert np.abs(e / (1 + e) - 1 / (1 + np.exp(-p))).max() < POLYNOMIAL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [8, 16])
def test_errors_of_polynomials_over_all_inputs(bits: int, scale: float) -> None:
    q = inputs(bits)
    x = q * scale
    found, step = sigmoid(q, scale)
    assert np.abs(found * step - real_sigmoid(x)).max() < POLYNOMIAL + ROUNDING < 8e-4
    found, step = tanh(q, scale)
    assert np.abs(found * step - np.tanh(x)).max() < 2 * (POLYNOMIAL + ROUNDING) < 1.6e-3


@pytest.mark.parametrize("scale", SCALES)
def test_errors_of_tables_are_those_of_the_division(scale: float) -> None:
    """Half a step; and of the divisor, 2 * 16383 at 1/2, half a unit: another half."""
    q = inputs(8)
    x = q * scale
    found, step = sigmoid(q, scale, "lut")
    assert np.abs(found * step - real_sigmoid(x)).max() < 2**-17 + 2**-17 + 2**-30
    found, step = tanh(q, scale, "lut")
    assert np.abs(found * step - np.tanh(x)).max() < 2**-16 + 2**-16 + 2**-29


@pytest.mark.parametrize("scale", [2.0**-20, 10 / 32767, 10 / 127, 0.3])
def test_errors_of_the_published_constants(scale: float) -> None:
    q = inputs(16)
    found, step = sigmoid(q, scale, "paper")
    assert np.abs(found * step - real_sigmoid(q * scale)).max() < 1.1e-3 + scale / 2


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", ["poly", "lut"])
def test_symmetry_is_exact_and_the_middle_too(scale: float, mode: Mode) -> None:
    q = inputs(8)
    found, _ = sigmoid(q, scale, mode)
    np.testing.assert_array_equal(found + found[::-1], 1 << 16)
    assert found[255] == 1 << 15
    odd, _ = tanh(q, scale, mode)
    np.testing.assert_array_equal(odd, -odd[::-1])


@pytest.mark.parametrize("bits", [1, 8, 15, 16])
def test_the_middle_and_the_ends_are_exact_at_any_width(bits: int) -> None:
    found, step = sigmoid(np.array([-255, 0, 255]), 16.0, bits=bits)
    assert found.tolist() == [0, 1 << (bits - 1), 1 << bits]
    assert found.max() * step == 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [8, 16])
def test_it_rises(bits: int, scale: float) -> None:
    """Where the input's steps are very fine, one step of the divisor can outweigh e's."""
    for function in (sigmoid, tanh):
        least = 0 if scale >= 2.0**-13 else -1
        assert np.diff(function(inputs(bits), scale)[0]).min() >= least


@pytest.mark.parametrize("scale", [2.0**-20, 10 / 32767, 10 / 127, 0.3, 1.0])
@pytest.mark.parametrize("bits", [8, 16])
def test_swish(bits: int, scale: float) -> None:
    """The error is that of sigmoid at x times |x|, largest near |x| = 1."""
    q = inputs(bits)
    x = q * scale
    found, step = swish(q, scale)
    # Relative to e / (1 + e) the error is 2.3e-3 at most, and |x| sigmoid(-|x|) <= 0.279.
    tolerance = 0.279 * 2.3e-3 + np.abs(x) * (2.0**-16 + 2.0**-18)
    assert (np.abs(found * step - x * real_sigmoid(x)) <= tolerance).all()
    assert found[q == 0] == 0


def test_glu_gates_the_first_half_by_the_second() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(-128, 128, (2, 3, 50))
    found, step = glu(a, 0.05, b, 0.04)
    expected = a * 0.05 * real_sigmoid(b * 0.04)
    tolerance = np.abs(a * 0.05) * (POLYNOMIAL + ROUNDING + 2**-16)
    assert (np.abs(found * step - expected) <= tolerance).all()
    swished, step = swish(b, 0.04)
    np.testing.assert_array_equal(swished, glu(b, 0.04, b, 0.04)[0])
    assert step == 0.04 * 2.0**-15


def test_paper_mode_refuses_coarse_steps() -> None:
    q = np.zeros(1, np.int64)
    for function, scale in ((sigmoid, 0.7), (tanh, 0.4)):
        with pytest.raises(IntqError, match="expected at most ln 2"):
            function(q, scale, "paper")


@law
@given(mode=modes, scale=scales, q=st.lists(st.integers(-LARGEST, LARGEST), min_size=1))
def test_results_stay_in_their_bounds(mode: Mode, scale: float, q: list[int]) -> None:
    widest = 255 if mode == "lut" else LARGEST
    if mode == "paper":
        scale = min(scale, math.log(2) / 2)
    x = np.clip(np.array([*q, -widest, 0, widest]), -widest, widest)
    assert sigmoid(x, scale, mode)[0].min() >= 0
    assert sigmoid(x, scale, mode)[0].max() <= 1 << 16
    assert np.abs(tanh(x, scale, mode)[0]).max() <= 1 << 15
    assert np.abs(swish(x, scale, mode)[0]).max() < 1 << 31


@law
@given(exponent=st.floats(-28, -0.53), bits=st.integers(1, 16))
def test_published_constants_never_divide_by_0(exponent: float, bits: int) -> None:
    """The exponential of 0 is as low as 0.34 where steps are near ln 2: one is above 2^31 there."""
    q = np.array([-LARGEST, -1, 0, 1, LARGEST])
    found, _ = sigmoid(q, 2.0**exponent, "paper", bits)
    assert found.min() >= 0
    assert found.max() <= 1 << bits
