import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.clipping import (
    DEAD_RANGE,
    OBSERVERS,
    _count_below,
    _divergences,
    clipping_range,
    mean_squared_error,
)
from onnx_intq.grid import Grid, affine, dequantize, quantize, symmetric
from onnx_intq.observe import Float64, Histogram
from onnx_intq.transform import IntqError

Floats = npt.NDArray[np.float32]

UNSIGNED, SIGNED = Grid(8, signed=False), Grid(8, signed=True)
GRIDS = pytest.mark.parametrize("grid", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
LAW = settings(derandomize=True, deadline=None, max_examples=30)
VALUES = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.floats(-4, 4, width=32)
    | st.just(0.0),
)


def histogram(values: npt.ArrayLike) -> Histogram:
    found = Histogram()
    found.update(np.asarray(values, np.float32), "x")
    return found


def actual_error(values: Floats, low: float, high: float, grid: Grid) -> float:
    scale, zero_point = (symmetric if grid.signed else affine)(low, high, grid)
    rounded = dequantize(quantize(values, scale, zero_point, grid), scale, zero_point)
    return float(np.square(rounded.astype(np.float64) - values).mean())


@LAW
@given(
    VALUES, st.sampled_from(OBSERVERS), st.sampled_from([UNSIGNED, SIGNED, Grid(4, signed=True)])
)
def test_every_range_holds_zero_and_lies_within_the_values(
    values: Floats, observer: str, grid: Grid
) -> None:
    low, high = clipping_range(histogram(values), observer, grid)
    assert low <= 0 <= high
    assert low < high
    if (low, high) != DEAD_RANGE:
        assert low >= min(values.min(), 0)
        assert high <= max(values.max(), 0)
    scale, _ = (symmetric if grid.signed else affine)(low, high, grid)
    assert np.isfinite(scale)
    assert np.isfinite(1 / scale)


@LAW
@given(VALUES)
def test_minmax_is_exact(values: Floats) -> None:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    expected = (low, high) if high - low >= 2.0**-52 else DEAD_RANGE
    assert clipping_range(histogram(values), "minmax", UNSIGNED) == expected


@LAW
@given(VALUES, st.sampled_from([50.0, 90.0, 99.0, 99.99, 100.0]))
def test_percentile_is_within_one_bin_of_the_exact_one(values: Floats, percentile: float) -> None:
    values = np.append(values, np.array([-1, 1], np.float32))
    seen = histogram(values)
    low, high = clipping_range(seen, "percentile", UNSIGNED, percentile=percentile)
    every = values.astype(np.float64)
    tail = (100 - percentile) / 2
    exact_low = min(np.percentile(every, tail, method="lower"), 0.0)
    exact_high = max(np.percentile(every, 100 - tail, method="higher"), 0.0)
    if (low, high) != DEAD_RANGE:
        assert exact_low * (1 + 2.0**-7) - 2.0**-133 <= low <= exact_low
        assert exact_high <= high <= exact_high * (1 + 2.0**-7) + 2.0**-133


def test_percentile_cuts_off_no_more_than_asked() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    low, high = clipping_range(histogram(values), "percentile", UNSIGNED)
    outside = ((values < low) | (values > high)).mean()
    assert 0 < outside <= 1e-4


@LAW
@given(VALUES, st.sampled_from([UNSIGNED, SIGNED, Grid(4, signed=False), Grid(16, signed=True)]))
def test_least_error_is_never_above_that_of_minmax(values: Floats, grid: Grid) -> None:
    seen = histogram(values)
    errors = [
        mean_squared_error(seen, *clipping_range(seen, observer, grid), grid)
        for observer in ("mse", "minmax")
    ]
    assert errors[0] <= errors[1]


def samples(kind: str) -> Floats:
    random = np.random.default_rng(0)
    values = {
        "normal": random.standard_normal(200_000),
        "rectified": np.maximum(random.standard_normal(200_000), 0),
        "laplace": random.laplace(0.5, 1.0, 200_000),
        "saturated": np.clip(random.standard_normal(200_000) * 3, 0, 6),
        "shifted": random.uniform(2, 3, 200_000),
    }
    return values[kind].astype(np.float32)


KINDS = pytest.mark.parametrize("kind", ["normal", "rectified", "laplace", "saturated", "shifted"])


@GRIDS
@KINDS
@pytest.mark.parametrize("observer", OBSERVERS)
def test_expected_error_is_what_quantization_makes(kind: str, observer: str, grid: Grid) -> None:
    values = samples(kind)
    seen = histogram(values)
    low, high = clipping_range(seen, observer, grid)
    expected, actual = (
        mean_squared_error(seen, low, high, grid),
        actual_error(values, low, high, grid),
    )
    # A squared rounding error varies by 0.9 of its mean: five deviations of the mean of those that
    # are not exactly zero, and half a bin of uncertainty (0.4 %) where values are clipped.
    assert actual == pytest.approx(expected, rel=5 * 0.9 / np.sqrt(50_000) + 0.004)


@GRIDS
@KINDS
def test_least_error_is_close_to_the_best_of_many_ranges(kind: str, grid: Grid) -> None:
    values = samples(kind)[:50_000]
    low, high = clipping_range(histogram(values), "mse", grid)
    floor, ceiling = min(values.min(), 0.0), max(values.max(), 0.0)
    ends = np.linspace(0.3, 1, 29)
    best = min(
        actual_error(values, max(floor, -reach), min(ceiling, reach), grid)
        for reach in max(-floor, ceiling) * ends
    )
    # The search leaves a grid of 2.2 % and uncertain tails: a few percent of the error.
    assert actual_error(values, low, high, grid) <= best * 1.03


def naive_divergence(counts: Float64, kept: int, levels: int) -> float:
    """The definition, bin by bin."""
    reference = counts[:kept].copy()
    reference[-1] += counts[kept:].sum()
    merged = np.zeros(kept)
    ends = np.rint(np.arange(levels + 1) * kept / levels).astype(int)
    for start, end in itertools.pairwise(ends):
        filled = reference[start:end] > 0
        if filled.any():
            merged[start:end][filled] = counts[start:end].sum() / filled.sum()
    p, q = reference / reference.sum(), merged / merged.sum()
    with np.errstate(divide="ignore"):
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@LAW
@given(hnp.arrays(np.int64, 40, elements=st.integers(0, 9)), st.sampled_from([4, 7, 16]))
def test_divergences_follow_the_definition(counts: npt.NDArray[np.int64], levels: int) -> None:
    counts[0] += 1
    kept = np.arange(levels, 41)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    found = _divergences(below, kept, levels)
    expected = [naive_divergence(counts.astype(float), int(k), levels) for k in kept]
    # Sums of at most 40 terms below 400 log 400.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_magnitudes_of_both_signs_are_counted_together() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    edges = np.linspace(0, 5, 11)
    found = _count_below(histogram(values).density(), edges)
    expected = [(np.abs(values) < edge).sum() for edge in edges]
    # Within a bin of at most 0.8 %, values need not be evenly spread: at most a bin's content.
    np.testing.assert_allclose(found, expected, rtol=0, atol=80)


@GRIDS
def test_entropy_keeps_an_even_distribution_whole(grid: Grid) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 100_000)
    low, high = clipping_range(histogram(values.astype(np.float32)), "entropy", grid)
    assert low < -0.98
    assert high > 0.98


@GRIDS
def test_entropy_clips_a_lone_outlier(grid: Grid) -> None:
    values = np.append(np.random.default_rng(0).standard_normal(100_000), 40.0)
    low, high = clipping_range(histogram(values.astype(np.float32)), "entropy", grid)
    assert low == pytest.approx(float(values.min()))
    assert high < 10


def test_entropy_ignores_zeros() -> None:
    values = samples("rectified")
    padded = np.append(values, np.zeros(10**6, np.float32))
    alone = clipping_range(histogram(values), "entropy", UNSIGNED)
    assert clipping_range(histogram(padded), "entropy", UNSIGNED) == alone


def test_entropy_keeps_everything_where_the_grid_is_finer_than_its_histogram() -> None:
    seen = histogram(samples("laplace"))
    assert clipping_range(seen, "entropy", Grid(16, signed=True)) == (seen.low, seen.high)


@GRIDS
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-30])
def test_dead_tensors_get_a_safe_range(value: float, observer: str, grid: Grid) -> None:
    assert clipping_range(histogram(np.full(5, value)), observer, grid) == DEAD_RANGE


@GRIDS
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [5.0, -5.0])
def test_a_constant_is_kept(value: float, observer: str, grid: Grid) -> None:
    low, high = clipping_range(histogram(np.full(5, value)), observer, grid)
    assert (low, high) == (min(value, 0.0), max(value, 0.0))


def test_a_rare_spike_does_not_leave_a_dead_range() -> None:
    values = np.append(np.zeros(10**6), 1.0)
    assert clipping_range(histogram(values), "percentile", UNSIGNED) == DEAD_RANGE
    assert clipping_range(histogram(values), "minmax", UNSIGNED) == (0.0, 1.0)


def test_unknown_observers_are_refused() -> None:
    with pytest.raises(IntqError, match="unknown observer 'max'; expected one of: minmax, perc"):
        clipping_range(histogram(np.ones(3)), "max", UNSIGNED)
