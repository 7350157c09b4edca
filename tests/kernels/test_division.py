from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.division import divide, reciprocal

law = settings(derandomize=True, deadline=None, max_examples=300)
integers = st.integers(-65535, 65535)
scales = st.floats(-20, 4).map(lambda exponent: 2.0**exponent)


def half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


@law
@given(integers, integers, st.integers(0, 45))
def test_quotients_are_exactly_rounded(a: int, b: int, bits: int) -> None:
    quotient, step = divide(np.array([a]), 1.0, np.array([b]), 1.0, bits)
    assert step == 2.0**-bits
    assert int(quotient[0]) == half_up(Fraction(a << bits, b or 1))


@law
@given(integers, integers, scales, scales)
def test_the_real_quotient_is_off_by_half_a_step(a: int, b: int, sa: float, sb: float) -> None:
    quotient, step = divide(np.array([a]), sa, np.array([b]), sb)
    expected = Fraction(a, b or 1) * Fraction(sa) / Fraction(sb)
    assert abs(int(quotient[0]) * step - expected) <= step / 2 * (1 + 1e-9)
    assert abs(quotient[0]) <= 65535 << 14


@pytest.mark.parametrize("bits", [0, 1, 14])
def test_every_8_bit_pair(bits: int) -> None:
    a, b = np.arange(-128, 128)[:, None], np.arange(-128, 128)
    quotient, _ = divide(a, 1.0, b, 1.0, bits)
    divisor = np.where(b == 0, 1, b)
    np.testing.assert_array_equal(quotient, np.floor((a << bits) / divisor + 0.5))


def test_zero_counts_as_one_step() -> None:
    quotient, step = divide(np.array([7, -7, 0]), 2.0, np.array([0, 0, 0]), 0.5)
    assert (quotient * step).tolist() == [28, -28, 0]
    value, step = reciprocal(np.array([0, 1, -1]), 0.25)
    assert (value * step).tolist() == [4, 4, -4]


@law
@given(integers, scales)
def test_reciprocals_have_14_bits(q: int, scale: float) -> None:
    value, step = reciprocal(np.array([q]), scale)
    expected = 1 / ((q or 1) * scale)
    assert abs(value[0] * step / expected - 1) <= 2.0**-14
    assert abs(value[0]) <= 1 << 30
