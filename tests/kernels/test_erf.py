import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.kernels.erf import ERF, GELU, ONE, Remainder, erf, gelu
from onnx_intq.kernels.exponential import Mode
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=100)
SCALES = [2.0**-20, 1e-4, 10 / 32767, 2.0**-8, 0.01, 10 / 127, 0.3, 1.0, 4.0, 16.0]
ROUNDING = {"erf": 1.6e-4, "gelu": 2.2e-4}
"""Of `_remainder`, 9.2e-5 and 6e-5 times the slope; GELU's are times u, where t is not 0."""
true_erf = np.vectorize(math.erf, otypes=[np.float64])


def true_gelu(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x * (1 + true_erf(x / math.sqrt(2))) / 2
    return found


def erf_error(shape: Remainder, u: np.ndarray) -> np.ndarray:
    """Over the reals, at u >= 0."""
    t = np.maximum(1 - u / shape.reach, 0)
    remainder: np.ndarray = np.minimum(t**4 * (shape.a - shape.b * t**2), 1)
    found: np.ndarray = 1 - remainder - true_erf(u)
    return found


def gelu_error(shape: Remainder, u: np.ndarray) -> np.ndarray:
    """Over the reals: at u and, the same, at -u."""
    found: np.ndarray = u - u * shape.a * np.maximum(1 - u / shape.reach, 0) ** 4 - true_gelu(u)
    return found


def alternations(error: np.ndarray, largest: float) -> int:
    """How often the error goes from one extreme, nearly, to the other, plus one."""
    signs = np.sign(error[np.abs(error) > 0.997 * largest])
    return int(np.count_nonzero(np.diff(signs))) + 1


Error = Callable[[Remainder, np.ndarray], np.ndarray]


@pytest.mark.parametrize(
    ("shape", "error", "largest", "coefficients"),
    [(ERF, erf_error, 4.59e-3, 3), (GELU, gelu_error, 3.84e-3, 2)],
)
def test_the_constants_have_the_least_largest_error(
    shape: Remainder, error: Error, largest: float, coefficients: int
) -> None:
    """Chebyshev: k coefficients are best when the error alternates between k + 1 extremes.

    And no constant can be changed for the better.
    """
    u = np.linspace(0, 6, 60_001)
    found = float(np.abs(error(shape, u)).max())
    assert found == pytest.approx(largest, rel=2e-3)
    assert alternations(error(shape, u), found) == coefficients + 1
    for name in ("reach", "a", "b")[:coefficients]:
        for factor in (0.998, 1.002):
            changed = replace(shape, **{name: getattr(shape, name) * factor})
            assert np.abs(error(changed, u)).max() > found


def test_the_published_constants_are_worse() -> None:
    u = np.linspace(0, 8, 8001)
    parabola = -0.2888 * (np.minimum(u, 1.769) - 1.769) ** 2 + 1
    assert np.abs(parabola - true_erf(u)).max() == pytest.approx(9.6e-2, rel=1e-2)
    parabola = -0.2888 * (np.minimum(u / math.sqrt(2), 1.769) - 1.769) ** 2 + 1
    assert np.abs(u * (1 + parabola) / 2 - true_gelu(u)).max() == pytest.approx(1.8e-2, rel=1e-2)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("largest", [255, 65535])
def test_the_error_over_all_inputs(scale: float, largest: int) -> None:
    q = np.arange(-largest, largest + 1)
    y, step = erf(q, scale)
    assert np.abs(y * step - true_erf(q * scale)).max() <= 4.59e-3 + ROUNDING["erf"]
    y, step = gelu(q, scale)
    assert np.abs(y * step - true_gelu(q * scale)).max() <= 3.84e-3 + ROUNDING["gelu"]
    assert np.abs(y).max() < 1 << 31


@law
@given(st.floats(-60, 40).map(lambda exponent: 2.0**exponent))
def test_laws(scale: float) -> None:
    """Erf is odd and rises; GELU(x) - GELU(-x) = x; both are exact beyond their reach."""
    q = np.unique(np.concatenate([np.arange(-300, 301), np.linspace(-65535, 65535, 999).round()]))
    q = q.astype(np.int64)
    y, _ = erf(q, scale)
    np.testing.assert_array_equal(y, -y[::-1])
    assert np.diff(y).min() >= 0
    assert (y[q * scale > ERF.reach * 1.0001] == ONE).all()
    y, step = gelu(q, scale)
    np.testing.assert_array_equal(y - y[::-1], q * ONE)
    assert step == scale / ONE
    assert (y[q * scale < -GELU.reach * 1.0001] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 10 / 127, 1.0])
def test_tables_are_exact(scale: float) -> None:
    q = np.arange(-255, 256)
    y, step = erf(q, scale, "lut")
    assert np.abs(y * step - true_erf(q * scale)).max() <= step / 2 * (1 + 1e-9)
    y, step = gelu(q, scale, "lut")
    assert np.abs(y * step - true_gelu(q * scale)).max() <= step / 2 * (1 + 1e-9)


@pytest.mark.parametrize("scale", [2.0**-12, 0.003, 10 / 127, 0.5, 1.0])
def test_paper_mode_is_the_published_algorithm(scale: float) -> None:
    """I-BERT, algorithm 3, with its negative scale; then as many bits are dropped as do no harm."""
    q = np.arange(-255, 256)
    y, step = erf(q, scale, "paper")
    b, c = math.floor(-1.769 / scale), math.floor(1 / (-0.2888 * scale**2))
    published = [int(np.sign(i)) * ((min(abs(i), -b) + b) ** 2 + c) for i in q.tolist()]
    drop = round(math.log2(step / (0.2888 * scale**2)))
    assert drop == max(0, (-c).bit_length() - 14)
    expected = [int(np.sign(p)) * (abs(p) >> drop) for p in published]
    assert y.tolist() == [-e for e in expected]


@pytest.mark.parametrize(("scale", "largest"), [(1e-4, 1.9e-2), (1e-3, 1.9e-2), (10 / 127, 1.9e-2)])
def test_paper_modes_errors(scale: float, largest: float) -> None:
    q = np.arange(-65535, 65536)
    y, step = gelu(q, scale, "paper")
    near = np.abs(q * scale) <= 8
    assert np.abs(y * step - true_gelu(q * scale))[near].max() <= largest
    assert np.abs(y).max() < 1 << 31
    y, step = erf(q, scale, "paper")
    assert np.abs(y * step - true_erf(q * scale)).max() <= 9.7e-2


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, 2.0**-25, 2.0**-20])
def test_paper_mode_takes_the_finest_scales(scale: float) -> None:
    q = np.array([-65535, -1, 0, 1, 65535])
    y, step = gelu(q, scale, "paper")
    assert np.abs(y * step - true_gelu(q * scale)).max() <= 0.05 * 65535 * scale
    assert np.abs(erf(q, scale, "paper")[0]).max() < 1 << 15


@pytest.mark.parametrize("mode", ["poly", "paper", "lut"])
def test_nothing_is_nothing(mode: Mode) -> None:
    zero = np.zeros(1, np.int64)
    assert erf(zero, 0.1, mode)[0] == 0
    assert gelu(zero, 0.1, mode)[0] == 0


def test_paper_mode_refuses_coarse_steps() -> None:
    zero = np.zeros(1, np.int64)
    with pytest.raises(IntqError, match=r"steps of 1\.5; expected at most 1 in mode paper; use"):
        erf(zero, 1.5, "paper")
    with pytest.raises(IntqError, match="an erf of steps of 1"):
        gelu(zero, 1.5, "paper")
