from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.average import average, mean

law = settings(derandomize=True, deadline=None, max_examples=200)


def half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


@law
@given(st.integers(1, 1 << 29), st.data(), st.integers(0, 16))
def test_averages_are_exactly_rounded(count: int, data: st.DataObject, bits: int) -> None:
    total = data.draw(st.integers(-65535 * count, 65535 * count))
    found = average(np.array([total]), count, bits)
    assert int(found[0]) == half_up(Fraction(total << bits, count))


def test_halves_go_up() -> None:
    assert average(np.array([-3, -1, 1, 3]), 2).tolist() == [-1, 0, 1, 2]


def test_windows_at_the_edges_have_fewer() -> None:
    """Average pooling of width 3 over 1, 2, 6, 7, without what is padded."""
    totals, counts = np.array([[3, 9, 15, 13]]), np.array([2, 3, 3, 2])
    assert average(totals, counts).tolist() == [[2, 3, 5, 7]]
    assert average(totals, counts, 1).tolist() == [[3, 6, 10, 13]]


@pytest.mark.parametrize("axes", [(0,), (-1,), (1, 2), (-1, -2, 0)])
@pytest.mark.parametrize("bits", [0, 8])
def test_mean_over_axes(axes: tuple[int, ...], bits: int) -> None:
    q = np.random.default_rng(0).integers(-65535, 65536, (3, 4, 7))
    y, step = mean(q, 0.1, q.shape, axes, bits)
    expected = (q * 0.1).mean(axis=axes, keepdims=True)
    assert y.shape == expected.shape
    assert step == 0.1 / 2**bits
    assert np.abs(y * step - expected).max() <= step / 2 * (1 + 1e-6)


@law
@given(st.integers(-65535, 65535), st.sampled_from([1, 2, 3, 4096]), st.sampled_from([0, 8, 16]))
def test_the_mean_of_equal_integers_is_the_integer(value: int, length: int, bits: int) -> None:
    y, _ = mean(np.full((1, length), value), 1.0, (1, length), (1,), bits)
    assert y.tolist() == [[value << bits]]
