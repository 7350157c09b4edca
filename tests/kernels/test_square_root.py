import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.square_root import bit_pairs, isqrt

law = settings(derandomize=True, deadline=None, max_examples=300)
LARGEST = (1 << 31) - 1
"""The root of the largest v, 2^62 - 1."""


def roots(values: list[int] | np.ndarray) -> np.ndarray:
    found: np.ndarray = isqrt(np.asarray(values, np.int64)[:, None])[:, 0]
    return found


def test_every_value_up_to_2_to_the_20() -> None:
    """Together with the proof, which starts at 4^10, these are all values there are."""
    v = np.arange(1 << 20)
    r = roots(v)
    assert r[0] == 1  # counts as 1
    r, v = r[1:], v[1:]
    assert ((r * r <= v) & (v < (r + 1) ** 2)).all()


def test_squares_and_their_neighbours() -> None:
    random = np.random.default_rng(0)
    powers = 1 << np.arange(1, 31)
    near = np.concatenate([powers - 1, powers, powers + 1, LARGEST - np.arange(1000)])
    k = np.unique(np.concatenate([near, random.integers(2, LARGEST, 20_000)]))
    k = k[(k > 1) & (k <= LARGEST)]
    np.testing.assert_array_equal(roots(k * k - 1), k - 1)
    np.testing.assert_array_equal(roots(k * k), k)
    np.testing.assert_array_equal(roots(k * k + 2 * k), k)  # the last v with this root


def test_where_the_start_is_worst() -> None:
    """Just above and below powers of four the table's start is off by a factor of sqrt(2)."""
    v = [(1 << (2 * k)) + near for k in range(1, 31) for near in range(-3, 4)]
    v = [x for x in v if x >= 1] + [(1 << 62) - 1]
    assert roots(v).tolist() == [math.isqrt(x) for x in v]


@law
@given(st.lists(st.integers(1, (1 << 62) - 1), min_size=1, max_size=20))
def test_random_values(values: list[int]) -> None:
    assert roots(values).tolist() == [math.isqrt(v) for v in values]


def test_what_is_below_1_counts_as_1() -> None:
    assert roots([0, -1, -(1 << 62)]).tolist() == [1, 1, 1]


def test_leading_axes_stay() -> None:
    v = np.array([[[4], [9]], [[16], [1 << 60]]])
    assert isqrt(v).tolist() == [[[2], [3]], [[4], [1 << 30]]]


@law
@given(st.integers(1, (1 << 62) - 1))
def test_bit_pairs(v: int) -> None:
    assert bit_pairs(np.array([v])).tolist() == [-(-v.bit_length() // 2)]
