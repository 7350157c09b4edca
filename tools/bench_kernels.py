"""The error of every integer kernel against float64, by mode and width of the input.

`python tools/bench.py kernels` prints it. Inputs are quantized symmetrically over [-10, 10]; the
reference is the exact function of the quantized input. Elementwise functions are tried at every
integer of the grid; softmax on rows of 250 normal logits (standard deviation 2.5), LayerNorm on
512 normal features, one of them 1, 20 or 100 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.console import table as show
from onnx_intq.grid import Grid, affine
from onnx_intq.kernels.erf import erf, gelu
from onnx_intq.kernels.exponential import Mode, exp
from onnx_intq.kernels.layer_norm import normalize
from onnx_intq.kernels.sigmoid import glu, sigmoid, swish, tanh
from onnx_intq.kernels.softmax import log_softmax, softmax, softmax_matmul
from onnx_intq.kernels.table import table
from onnx_intq.transform import IntqError

Real = npt.NDArray[np.float64]
Kernel = Callable[..., tuple[Any, float]]
Measure = Callable[[Mode, int], float]

RANGE = 10.0
CASES: tuple[tuple[Mode, int], ...] = (
    *(("poly", 8), ("poly", 16)),
    *(("paper", 8), ("paper", 16)),
    ("lut", 8),
)
"""Tables are for 8-bit inputs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One function.

    Attributes:
        name: With what is measured.
        target: The most that mode "poly" may be off, None without a target.
        bits: The widths of input the target holds for.
        errors: Mode and bits -> the error; None where the mode refuses such steps.
    """

    name: str
    target: float | None
    bits: tuple[int, ...]
    errors: Mapping[tuple[Mode, int], float | None]


def rows() -> list[Row]:
    """Measure everything: about a second."""
    both = (8, 16)
    return [
        _row("exp, x <= 0", 2.1e-3, both, _elementwise(exp, np.exp, positive=False)),
        _row("sigmoid", 8e-4, both, _elementwise(sigmoid, _sigmoid)),
        _row("tanh", 1.6e-3, both, _elementwise(tanh, np.tanh)),
        _row("swish", None, both, _elementwise(swish, lambda x: x * _sigmoid(x))),
        _row("GLU, both halves equal", None, both, _elementwise(_glu, lambda x: x * _sigmoid(x))),
        _row("erf", None, both, _elementwise(erf, np.vectorize(math.erf))),
        _row("GELU", 2.5e-2, both, _elementwise(gelu, _gelu)),
        _row("softmax over 250", 2.5e-3, both, _softmax),
        _row("log-softmax over 250", None, both, _log_softmax),
        _row("softmax @ v over 250, relative rms", None, both, _attention),
        _row("LayerNorm over 512, rms", 5e-5, (16,), _layer_norm),
    ]


def print_table() -> None:
    """Print `rows`."""
    header = ("function", "target (poly)", *(f"{mode}, {bits} bits" for mode, bits in CASES))
    cells = [(r.name, _cell(r.target), *(_cell(r.errors[case]) for case in CASES)) for r in rows()]
    title = "largest error against float64, inputs over [-10, 10]"
    show(f"{title}; a table's result has 8 bits, too, but in the last four rows", header, cells)


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _row(name: str, target: float | None, bits: tuple[int, ...], measure: Measure) -> Row:
    errors: dict[tuple[Mode, int], float | None] = {}
    for mode, width in CASES:
        try:
            errors[mode, width] = measure(mode, width)
        except IntqError:
            errors[mode, width] = None
    return Row(name=name, target=target, bits=bits, errors=errors)


def _elementwise(kernel: Kernel, real: Callable[[Real], Real], *, positive: bool = True) -> Measure:
    """The largest error over the grid. Mode "lut" maps 8 bits to 8 bits, half a step included."""

    def measure(mode: Mode, bits: int) -> float:
        largest = (1 << (bits - 1)) - 1
        q = np.arange(-largest, (largest if positive else 0) + 1)
        scale = RANGE / largest
        expected = real(q * np.float64(scale))
        found = (
            _tabled(real, q, scale, expected) if mode == "lut" else _product(kernel(q, scale, mode))
        )
        return float(np.abs(found - expected).max())

    return measure


def _tabled(real: Callable[[Real], Real], q: Any, scale: float, expected: Real) -> Real:
    grid = Grid(8, signed=False)
    step, zero_point = affine(float(expected.min()), float(expected.max()), grid)
    entries = table(
        real, scale, 0, int(q[0]), int(q[-1]), float(step), zero_point, grid.low, grid.high
    )
    found: Real = (entries - zero_point) * np.float64(step)
    return found


def _product(found: tuple[Any, float]) -> Real:
    integers, step = found
    real: Real = integers * step
    return real


def _logits(bits: int) -> tuple[Any, float]:
    x = np.clip(np.random.default_rng(0).normal(0, 2.5, (1000, 250)), -RANGE, RANGE)
    scale = RANGE / ((1 << (bits - 1)) - 1)
    return np.rint(x / scale).astype(np.int64), scale


def _softmax(mode: Mode, bits: int) -> float:
    q, scale = _logits(bits)
    expected = np.exp(_real_log_softmax(q * scale))
    return float(np.abs(_product(softmax(q, scale, -1, mode)) - expected).max())


def _log_softmax(mode: Mode, bits: int) -> float:
    q, scale = _logits(bits)
    expected = _real_log_softmax(q * scale)
    return float(np.abs(_product(log_softmax(q, scale, -1, mode)) - expected).max())


def _attention(mode: Mode, bits: int) -> float:
    """The result has 16 bits, so that the error is that of the 8-bit exponentials."""
    q, scale = _logits(bits)
    v = np.random.default_rng(1).integers(-128, 128, (250, 64))
    grid = Grid(16, signed=True)
    found = softmax_matmul(
        q, scale, v, 256.0, zero_point=0, low=grid.low, high=grid.high, mode=mode
    )
    expected = np.exp(_real_log_softmax(q * scale)) @ v
    return _rms(found / 256 - expected) / _rms(expected)


def _layer_norm(mode: Mode, bits: int) -> float:
    """The worst of three sizes of the first feature."""
    worst = 0.0
    for outlier in (1, 20, 100):
        x = np.random.default_rng(outlier).normal(0, 1, (200, 512))
        x[:, 0] *= outlier
        scale = float(np.abs(x).max()) / ((1 << (bits - 1)) - 1)
        q = np.rint(x / scale).astype(np.int64)
        real = q * scale
        centred = real - real.mean(axis=-1, keepdims=True)
        expected = centred / np.sqrt(real.var(axis=-1, keepdims=True) + 1e-5)
        found = _product(normalize(q, scale, 512, 1e-5, mode))
        worst = max(worst, _rms(found - expected))
    return worst


def _rms(x: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.square(x).mean()))


def _real_log_softmax(x: Real) -> Real:
    below = x - x.max(axis=-1, keepdims=True)
    real: Real = below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
    return real


def _sigmoid(x: Real) -> Real:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _gelu(x: Real) -> Real:
    real: Real = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return real


def _glu(q: Any, scale: float, mode: Mode) -> tuple[Any, float]:
    return glu(q, scale, q, scale, mode)
