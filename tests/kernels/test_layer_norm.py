import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.layer_norm import LONGEST, normalize
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=100)
LENGTHS = [1, 2, 3, 64, 512, 768, 1024, 4096]
FULL = 65535


def real(q: np.ndarray, scale: float, epsilon: float) -> np.ndarray:
    """In float64; from exact integers, so that equal elements give exactly 0."""
    n = q.shape[-1]
    deviation = n * q - q.sum(-1, keepdims=True)
    variance = (deviation.astype(np.float64) ** 2).sum(-1, keepdims=True) / n
    found: np.ndarray = deviation / np.sqrt(np.maximum(variance + epsilon * (n / scale) ** 2, 1e-9))
    return found


def error(q: np.ndarray, scale: float, epsilon: float, mode: Mode = "poly") -> np.ndarray:
    y, step = normalize(q, scale, q.shape[-1], epsilon, mode)
    found: np.ndarray = y * step - real(q, scale, epsilon)
    return found


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def activations(bits: int, length: int, outlier: float) -> tuple[np.ndarray, float]:
    """Normally distributed, one channel `outlier` times as large, 16 or 8 bits."""
    x = np.random.default_rng(length).standard_normal((40, length))
    x[:, length // 2] *= outlier
    scale = np.abs(x).max() / ((1 << (bits - 1)) - 1)
    return np.rint(x / scale).astype(np.int64), float(scale)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("outlier", [1, 20, 100])
@pytest.mark.parametrize(("bits", "largest"), [(16, 5e-6), (8, 5e-5)])
def test_the_error(length: int, outlier: float, bits: int, largest: float) -> None:
    q, scale = activations(bits, length, outlier)
    for epsilon in (0.0, 1e-5, 1e-3, 1.0):
        assert rms(error(q, scale, epsilon)) < largest


@pytest.mark.parametrize("length", [64, 512, 4096])
def test_16_bits_lose_only_the_rounding_of_the_result(length: int) -> None:
    """Errors that are uniform over half a step up and down: 0.29 steps, and no bias."""
    q, scale = activations(16, length, 1)
    steps = error(q, scale, 1e-5) / normalize(q, scale, length, 1e-5)[1]
    assert rms(steps) == pytest.approx(12**-0.5, rel=0.05)
    assert abs(steps.mean()) < 0.05


@pytest.mark.parametrize(("outlier", "low", "high"), [(1, 5e-5, 1e-4), (100, 9e-4, 3e-3)])
def test_paper_mode_rounds_the_mean(outlier: float, low: float, high: float) -> None:
    """ALGORITHMS.md 1.5: I-BERT's error for 512 channels in 16 bits."""
    q, scale = activations(16, 512, outlier)
    assert low < rms(error(q, scale, 0.0, "paper")) < high


def test_paper_mode_is_the_published_algorithm() -> None:
    """One row at a time, on Python's integers: mean rounded, root and quotients floored."""
    q, scale = activations(8, 33, 20)
    y, step = normalize(q, scale, 33, 1e-5, "paper")
    assert step == math.sqrt(33) / 2**30
    for row, found in zip(q.tolist(), y.tolist(), strict=True):
        mean = math.floor(sum(row) / 33 + 0.5)
        factor = 2**31 // math.isqrt(sum((x - mean) ** 2 for x in row))
        assert found == [(x - mean) * factor // 2 for x in row]


def extremes(length: int, low: int, high: int) -> np.ndarray:
    """Rows at the ends of the range: one element, half of them, all, none."""
    rows = np.full((7, length), low)
    rows[0, 0] = high
    rows[1, : length // 2] = high
    rows[2, 1:] = high
    rows[3] = high
    rows[4, ::2] = high
    rows[5, 0] = low + 1
    return rows


def allowed(expected: np.ndarray, length: int, step: float) -> np.ndarray:
    """One unit in the root, one in the quotient, half a step of the result.

    A row that is not constant has V >= n - 1, and n 2^e >= 2^14: its root is >= 2^14 sqrt(n-1) / n.
    """
    root = length / (math.sqrt(max(length - 1, 1)) * 2**14)
    found: np.ndarray = np.abs(expected) * (root + 2.0**-21) + step
    return found


@law
@given(
    length=st.integers(1, 4096) | st.sampled_from([*LENGTHS, LONGEST]),
    scale=st.floats(-20, 4).map(lambda exponent: 2.0**exponent),
    epsilon=st.just(0.0) | st.floats(-12, 3).map(lambda exponent: 10.0**exponent),
    low=st.sampled_from([-FULL, -(1 << 15), 0]),
    width=st.sampled_from([1, 255, 32767, FULL]),
)
def test_nothing_overflows_at_the_extremes(
    length: int, scale: float, epsilon: float, low: int, width: int
) -> None:
    """An overflow would be off by far more. `bounded` checks the proven intervals, too."""
    q = extremes(length, low, low + width)
    y, step = normalize(q, scale, length, epsilon)
    assert np.abs(y).max() <= 1 << 25  # a root of 1, floored, doubles it at most
    expected = real(q, scale, epsilon)
    assert (np.abs(y * step - expected) <= allowed(expected, length, step)).all()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-40, 2.0**-30, 2.0**-20, 1e-3])
@pytest.mark.parametrize("length", [1, 512, LONGEST])
def test_epsilon_may_dwarf_the_variance(scale: float, length: int) -> None:
    q = extremes(length, -(1 << 15), (1 << 15) - 1)
    for epsilon in (1e-12, 1e-5, 1e3):
        y, step = normalize(q, scale, length, epsilon)
        expected = real(q, scale, epsilon)
        assert (np.abs(y * step - expected) <= allowed(expected, length, step)).all()


@pytest.mark.parametrize("mode", ["poly", "paper", "lut"])
def test_constant_rows_give_0(mode: Mode) -> None:
    q = np.repeat([[-FULL], [0], [3]], 7, axis=1)
    for epsilon in (0.0, 1e-5):
        assert not normalize(q, 0.1, 7, epsilon, mode)[0].any()


@law
@given(st.lists(st.integers(-128, 127), min_size=2, max_size=50), st.integers(-30_000, 30_000))
def test_adding_a_constant_changes_nothing(row: list[int], constant: int) -> None:
    """Exactly: only differences enter. The paper's mean is shifted as exactly."""
    q = np.array([row])
    for mode in ("poly", "paper"):
        y, _ = normalize(q, 0.1, len(row), 1e-5, mode)
        shifted, _ = normalize(q + constant, 0.1, len(row), 1e-5, mode)
        np.testing.assert_array_equal(y, shifted)


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_lengths_it_cannot_do(length: int) -> None:
    with pytest.raises(IntqError, match=f"over {length} elements; expected 1 to 32768; keep"):
        normalize(np.zeros((1, 1), np.int64), 1.0, length)
