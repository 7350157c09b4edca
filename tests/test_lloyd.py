"""Centroids fitted to weights: never worse than the uniform grid, and near the known optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.grid import dequantize, quantize, weight_grid, weight_scales
from onnx_intq.lloyd import TOP, Fit, fit, fit_mu_law, mu_law, nearest


def error(found: Fit, rows: np.ndarray, factors: np.ndarray) -> float:
    lost = found.stored * found.scales[:, None].astype(np.float64) - rows
    return float((factors * lost**2).sum())


def decibels(found: Fit, rows: np.ndarray) -> float:
    return 10 * float(np.log10((rows**2).sum() / error(found, rows, np.ones_like(rows))))


@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_at_most_2_to_the_bits_integers_and_no_worse_than_uniform(
    seed: int, bits: int, channels: int, size: int, weighted: bool
) -> None:
    random = np.random.default_rng(seed)
    rows = random.laplace(size=(channels, size)).astype(np.float32)
    factors = (random.uniform(0, 2, rows.shape) if weighted else rows * 0 + 1).astype(np.float32)
    found = fit(rows, factors, bits)
    assert found.stored.dtype == np.int8
    assert np.abs(found.stored.astype(int)).max() <= TOP
    assert len(np.unique(found.stored)) <= 1 << bits
    assert (found.scales > 0).all()
    if bits > 1:
        scales = weight_scales(rows, 0, bits)
        uniform = Fit(quantize(rows, scales, 0, weight_grid(bits), 0).astype(np.int8), scales)
        assert error(found, rows, factors) <= error(uniform, rows, factors) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("bits", "best"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)]
)
def test_gaussian_weights_come_near_the_best_there_is(bits: int, best: float) -> None:
    """The best SQNR of real centroids (Max 1960, table 1); integers lose up to 0.2 dB at 5 bits."""
    rows = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    assert decibels(fit(rows, np.ones_like(rows), bits), rows) > best - 0.4


def test_a_channel_of_zeros_and_an_outlier() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    rows[0], rows[1, 0] = 0, 40
    for found in (fit(rows, np.ones_like(rows), 4), fit_mu_law(rows, np.ones_like(rows), 4)):
        real = dequantize(found.stored, found.scales, 0, 0)
        assert np.abs(real[0]).max() < 1e-12
        assert abs(real[1, 0] - 40) < 4  # an outlier keeps its place
    silent = fit(rows, np.zeros_like(rows), 3)
    assert np.isfinite(silent.scales).all()


@pytest.mark.parametrize("shape", [(300, 600), (1, 200_000)])
def test_curves_are_compared_on_a_sample(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).laplace(size=shape).astype(np.float32)
    assert decibels(fit_mu_law(rows, np.ones_like(rows), 4), rows) > 17.5


def test_what_counts_more_is_fitted_better() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(8, 256)).astype(np.float32)
    factors = np.ones_like(rows)
    factors[:, :16] = 100
    found = [fit(rows, each, 3) for each in (factors, np.ones_like(rows))]
    of_first = [np.square(f.stored * f.scales[:, None] - rows)[:, :16].sum() for f in found]
    assert of_first[0] < of_first[1]


def test_mu_law_levels_are_symmetric_and_denser_near_zero() -> None:
    levels = mu_law(4, 16.0)
    assert len(levels) == 16
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-4)
    np.testing.assert_allclose(levels[-1], TOP)
    steps = np.diff(levels[8:])
    assert (np.diff(steps) > 0).all()


@given(st.integers(0, 999))
def test_nearest_is_nearest(seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = np.unique(random.integers(-127, 128, 9)).astype(np.float32)
    values = random.uniform(-200, 200, 50).astype(np.float32)
    found = np.abs(levels[nearest(levels, values)] - values)
    assert (found <= np.abs(levels[:, None] - values).min(axis=0) + 1e-4).all()
