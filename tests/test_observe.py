import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.observe import BINS, CHUNK, Histogram
from onnx_intq.transform import IntqError

Floats = npt.NDArray[np.float32]

FLOATS = hnp.arrays(
    np.float32,
    st.integers(0, 60),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
)
LAW = settings(derandomize=True, deadline=None, max_examples=50)


def histogram(*pieces: Floats) -> Histogram:
    found = Histogram()
    for piece in pieces:
        found.update(piece, "x")
    return found


def same(a: Histogram, b: Histogram) -> bool:
    return np.array_equal(a.counts, b.counts) and (a.low, a.high) == (b.low, b.high)


@LAW
@given(FLOATS)
def test_a_value_is_counted_in_the_bin_of_its_upper_half(values: Floats) -> None:
    expected = np.zeros(BINS, np.int64)
    for value in values:
        (pattern,) = struct.unpack("<I", struct.pack("<f", value))
        expected[pattern >> 16] += 1
    found = histogram(values)
    np.testing.assert_array_equal(found.counts, expected)
    assert found.count == values.size


@LAW
@given(FLOATS, st.lists(st.integers(0, 60), max_size=4))
def test_cuts_and_order_do_not_matter(values: Floats, cuts: list[int]) -> None:
    shuffled = np.random.default_rng(0).permutation(values)
    assert same(histogram(values), histogram(*np.split(shuffled, sorted(cuts))))


@LAW
@given(FLOATS, FLOATS, FLOATS)
def test_merging_is_associative_and_commutative(a: Floats, b: Floats, c: Floats) -> None:
    x, y, z = histogram(a), histogram(b), histogram(c)
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(y), y.merge(x))
    assert same(x.merge(y), histogram(a, b))
    assert same(x.merge(Histogram()), x)


def test_large_arrays_are_counted_chunk_by_chunk() -> None:
    values = np.full(CHUNK + 7, 1.5, np.float32)
    assert same(histogram(values), histogram(values[:10], values[10:]))


def test_strided_arrays_of_any_rank_are_counted() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert same(histogram(values[:, ::2].T), histogram(values[:, 0], values[:, 2]))


@pytest.mark.parametrize(
    ("value", "found"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
def test_what_is_not_finite_is_refused_by_name(value: float, found: str) -> None:
    seen = histogram(np.ones(3, np.float32))
    with pytest.raises(IntqError, match=f"'scores' holds {found}; expected finite"):
        seen.update(np.array([1.0, value, 2.0], np.float32), "scores")
    assert seen.count == 3
    assert (seen.low, seen.high) == (1.0, 1.0)


@LAW
@given(FLOATS)
def test_density_holds_every_value_that_is_not_zero(values: Floats) -> None:
    # Values below 2^-133 share the bin of zero.
    kept = values[np.abs(values) >= 2.0**-133].astype(np.float64)
    density = histogram(values).density()
    assert density.counts.sum() == kept.size
    assert (density.lower < density.upper).all()
    places = np.clip(np.searchsorted(density.lower, kept, side="right") - 1, 0, None)
    assert (kept <= density.upper[places]).all()
    # A bin is at most one part in 128 of its smallest magnitude wide, or 2^-133.
    smallest = np.minimum(np.abs(density.lower), np.abs(density.upper))
    assert (density.upper - density.lower <= np.maximum(smallest / 128, 2.0**-133)).all()


def test_bins_ascend_from_the_most_negative_value_to_the_most_positive() -> None:
    edges, counts = histogram(np.array([-2.0, -0.0, 0.0, 3.0], np.float32)).ascending()
    assert (np.diff(edges) > 0).all()
    assert edges[[0, -1]].tolist() == [-np.inf, np.inf]
    seen = np.flatnonzero(counts)
    assert [(edges[i], edges[i + 1]) for i in (seen[0], seen[-1])] == [
        (-2.015625, -2.0),
        (3.0, 3.015625),
    ]
