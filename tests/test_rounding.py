from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.rounding import round_rows, squared_errors


def case(seed: int, groups: int, outputs: int, taps: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    target = random.uniform(-6, 6, (groups, outputs, taps)).astype(np.float32)
    x = (random.standard_normal((groups, 40, taps)) + 2).astype(np.float32)
    moment = np.swapaxes(x, 1, 2) @ x / 40 + 0.01 * np.eye(taps, dtype=np.float32)
    bounds = np.stack([np.floor(target), np.ceil(target)])
    return target, np.rint(target), moment, bounds


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 4), st.integers(1, 80))
def test_no_row_gets_worse_and_all_stay_within_bounds(
    seed: int, groups: int, outputs: int, taps: int
) -> None:
    target, start, moment, bounds = case(seed, groups, outputs, taps)
    found = round_rows(target, start, moment, bounds)
    assert np.array_equal(found, np.rint(found))
    assert (bounds[0] <= found).all()
    assert (found <= bounds[1]).all()
    errors = [squared_errors(q - target, moment) for q in (found, start)]
    assert (errors[0] <= errors[1]).all()


def test_it_comes_close_to_the_best_of_all_roundings() -> None:
    target, start, moment, bounds = case(0, 1, 6, 10)
    choices = ((np.arange(1024)[:, None] >> np.arange(10)) & 1).astype(np.float32)
    all_rounded = bounds[0][0][:, None] + choices  # [outputs, 1024, taps]
    differences = all_rounded - target[0][:, None]
    best = squared_errors(differences, np.repeat(moment, 6, axis=0)).min(axis=1)
    found = squared_errors(round_rows(target, start, moment, bounds) - target, moment)[0]
    nearest = squared_errors(start - target, moment)[0]
    assert found.sum() < 0.5 * nearest.sum()
    assert found.sum() < 2 * best.sum()


def test_without_correlation_the_nearest_integers_are_best() -> None:
    target, start, _, bounds = case(1, 2, 3, 70)
    moment = np.repeat(np.eye(70, dtype=np.float32)[None], 2, axis=0)
    assert np.array_equal(round_rows(target, start, moment, bounds), start)


@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 4), st.integers(1, 80))
def test_levels_of_a_codebook_are_kept_to(seed: int, groups: int, outputs: int, taps: int) -> None:
    target, _, moment, _ = case(seed, groups, outputs, taps)
    random = np.random.default_rng(seed)
    levels = np.unique(random.integers(-9, 10, 6)).astype(np.float32)
    above = np.clip(np.searchsorted(levels, target), 1, max(len(levels) - 1, 1))
    bounds = np.stack([levels.take(above - 1, mode="clip"), levels.take(above, mode="clip")])
    start = levels[np.abs(levels[:, None, None, None] - target).argmin(axis=0)]
    found = round_rows(target, start, moment, bounds, levels)
    assert np.isin(found, levels).all()
    errors = [squared_errors(q - target, moment) for q in (found, start)]
    assert (errors[0] <= errors[1]).all()
