from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.balance import balance_rows

SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)


@given(hnp.arrays(np.float64, SHAPES, elements=st.floats(-6.4, 6.4)))
def test_errors_cancel_within_kernels_and_channels(target: np.ndarray) -> None:
    found = balance_rows(target, np.rint(target), 7)
    error = found - target
    assert np.array_equal(found, np.rint(found))
    assert np.abs(error).max() <= 1
    assert np.abs(error.sum(axis=(1, 2))).max() <= 0.5 + 1e-9
    largest = 0.5 if target.shape[1] == 1 else 1.0
    assert np.abs(error.sum(axis=2)).max() <= largest + 1e-9


@given(hnp.arrays(np.float64, SHAPES, elements=st.floats(-9, 9)))
def test_nothing_leaves_the_grid_or_moves_by_more_than_one(target: np.ndarray) -> None:
    start = np.clip(np.rint(target), -3, 3)
    found = balance_rows(target, start, 3)
    assert np.abs(found).max() <= 3
    assert np.abs(found - start).max() <= 1


def test_the_errors_closest_to_a_half_are_flipped() -> None:
    target = np.array([[[0.4, 1.45, 2.3, 3.0]]])
    assert balance_rows(target, np.rint(target), 7).tolist() == [[[0.0, 2.0, 2.0, 3.0]]]


def test_of_an_output_channel_the_kernels_with_the_largest_sums_are_flipped() -> None:
    target = np.array([[[0.4, 0.0], [0.3, 0.0], [0.45, 0.0]]])
    assert balance_rows(target, np.rint(target), 7)[0, :, 0].tolist() == [0.0, 0.0, 1.0]
