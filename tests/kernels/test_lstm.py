"""The step of an LSTM in integers: near the float one for ever, and the arithmetic it says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.grid import dyadic as nearest
from onnx_intq.grid import quantize, requantize, weight_grid, weight_scales
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.lstm import FRACTION, Cell, Gates, interpolated, table, unrolled
from onnx_intq.transform import IntqError

law = settings(derandomize=True, deadline=None, max_examples=60)
MODES: tuple[Mode, ...] = ("poly", "paper", "lut")
INPUTS, WIDTH, BATCH = 20, 32, 2


def sigmoid(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = 0.5 + 0.5 * np.tanh(x / 2)
    return found


class Float:
    """An LSTM with random weights, in float64."""

    def __init__(self, gain: float = 1.5) -> None:
        random = np.random.default_rng(0)
        bound = gain / np.sqrt(WIDTH)
        self.w = random.uniform(-bound, bound, (4 * WIDTH, INPUTS))
        self.r = random.uniform(-bound, bound, (4 * WIDTH, WIDTH))
        self.bias = random.uniform(-bound, bound, 4 * WIDTH)
        self.cells = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        h = c = np.zeros((x.shape[1], WIDTH))
        states = []
        for now in x:
            i, o, f, g = np.split(now @ self.w.T + h @ self.r.T + self.bias, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            self.cells = max(self.cells, np.abs(c).max())
            states.append(h)
        return np.array(states)


def integers(net: Float, x: np.ndarray, reach: float, mode: Mode, octaves: int = 2) -> np.ndarray:
    """The same in integers; 8 bits for weights and states, h within `reach`."""
    scale, x_scale = reach / 127, np.abs(x).max() / 127
    stored, steps = [], []
    for weight in (net.w, net.r):
        scales = weight_scales(weight, 0, 8).astype(np.float64)
        stored.append(quantize(weight, scales, 0, weight_grid(8), 0).astype(np.int64))
        steps.append(scales)
    sums = INPUTS * 127 * 127, WIDTH * 128 * 127
    gates = Gates.of(x_scale * steps[0], scale * steps[1], net.bias, sums)
    limits = {"zero_point": 3, "low": -128, "high": 127}
    cell = Cell(gates=gates, octaves=octaves, scale=scale, mode=mode, **limits)
    start = np.zeros((x.shape[1], WIDTH), np.int64)
    products = np.rint(x / x_scale).astype(np.int64) @ stored[0].T
    states, last, _ = unrolled(gates.of_input(products), stored[1], start + 3, start, cell)
    assert np.array_equal(states[-1], last)
    found: np.ndarray = (states - 3) * scale
    return found


def error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.square(have - want).mean() / np.square(want).mean()))


@pytest.mark.parametrize("mode", MODES)
def test_the_error_does_not_grow_over_1000_steps(mode: Mode) -> None:
    """2 % of the hidden state, which has 8 bits, at the start as at the end."""
    net, x = Float(), np.random.default_rng(1).standard_normal((1000, BATCH, INPUTS))
    want = net(x)
    have = integers(net, x, np.abs(want).max(), mode)
    parts = [error(have[k : k + 100], want[k : k + 100]) for k in range(0, 1000, 100)]
    assert 0.005 < max(parts) < 0.025
    assert parts[-1] < 1.3 * parts[0]


def test_a_cell_with_too_small_a_range_is_cut_off_there() -> None:
    """Where it would be beyond, the float one has no other sign: the error is bounded."""
    net, x = Float(4.0), np.random.default_rng(1).standard_normal((200, BATCH, INPUTS))
    want = net(x)
    assert 2 < net.cells < 8
    enough, few = (error(integers(net, x, 1.0, "lut", m), want) for m in (3, 2))
    assert enough < few + 0.02 < 0.3


def gates(reach: int = 1 << 20, **changed: Any) -> Gates:
    settings_ = {
        "input_steps": np.array([2e-4, 1e-4, 3e-4, 0.0]),
        "hidden_steps": np.array([1e-4, 2e-5, 1e-4, 1e-4]),
        "bias": np.array([0.5, -1.0, 0.0, 100.0]),
    } | changed
    return Gates.of(reach=(reach, reach), **settings_)


@law
@given(
    x=st.lists(st.integers(-(1 << 20), 1 << 20), min_size=4, max_size=4),
    h=st.lists(st.integers(-(1 << 20), 1 << 20), min_size=4, max_size=4),
)
def test_gates_are_rounded_once(x: list[int], h: list[int]) -> None:
    found = gates()
    steps = [
        np.ldexp(f.astype(float), -found.shift) for f in (found.input_factors, found.hidden_factors)
    ]
    offset = np.array([0.5, -1.0, 0.0, 100.0]) * 2**FRACTION
    real = steps[0] * x + steps[1] * h + offset
    want = np.clip(np.floor(real + 0.5), -(1 << 15) + 1, (1 << 15) - 1)
    assert found.total(found.of_input(np.array(x)), np.array(h)).tolist() == want.tolist()


def test_small_steps_keep_their_precision() -> None:
    found = gates(input_steps=np.full(4, 2.0**-60), hidden_steps=np.full(4, 2.0**-50))
    assert found.shift == 40
    assert (
        np.abs(found.total(found.of_input(np.zeros(4, int)), 0)[:3] - [2048, -4096, 0]).max() == 0
    )


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"input_steps": np.full(4, 2.0**18)}, "requantisation by 1.07374e"),
        ({"bias": np.full(4, 1e10)}, "gates reach"),
        ({"reach": 1 << 40}, "gates reach"),
    ],
)
def test_what_does_not_fit(changed: dict[str, Any], found: str) -> None:
    with pytest.raises(IntqError, match=found):
        gates(**changed)


@law
@given(
    products=st.integers(-(1 << 31), 1 << 31),
    scale=st.floats(1e-4, 0.1),
    zero_point=st.integers(0, 255),
)
def test_the_hidden_state_is_requantised(products: int, scale: float, zero_point: int) -> None:
    limits: dict[str, Any] = {"zero_point": zero_point, "low": 0, "high": 255}
    cell = Cell(gates=gates(), octaves=3, scale=scale, **limits)
    want = requantize(np.array(products), nearest(2.0**-31 / scale, bits=30), **limits)
    assert cell._hidden(np.array(products)) == want


@law
@given(
    octaves=st.integers(2, 15),
    gate=st.tuples(st.integers(0, 1 << 16), st.integers(0, 1 << 16)),
    g=st.integers(-(1 << 15), 1 << 15),
    c=st.integers(-(1 << 15), (1 << 15) - 1),
)
def test_a_cell_is_rounded_once(octaves: int, gate: tuple[int, int], g: int, c: int) -> None:
    limits: dict[str, Any] = {"zero_point": 0, "low": -128, "high": 127}
    cell = Cell(gates=gates(), octaves=octaves, scale=0.01, **limits)
    (i, f), m = gate, octaves
    want = ((f * c << m) + i * g + (1 << (15 + m))) >> (16 + m)
    have = cell._cell(*(np.array(v) for v in (i, f, g, c)))
    assert have == min(max(want, -(1 << 15)), (1 << 15) - 1)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("reach", "spacing", "largest"), [(8, 7, 1.2e-4), (32, 5, 1.2e-4), (1, 7, 4e-5)]
)
def test_tables_between_their_entries(
    name: str, reach: float, spacing: int, largest: float
) -> None:
    q = np.arange(-(1 << 15), 1 << 15)
    entries = table(name, reach, spacing)
    assert len(entries) == (1 << (16 - spacing)) + 1
    found = interpolated(q, (entries,), spacing) / 2 ** (15 if name == "tanh" else 16)
    x = q * (reach / 2**15)
    assert np.abs(found - (np.tanh(x) if name == "tanh" else sigmoid(x))).max() < largest
    assert (np.diff(found) >= 0).all()


def test_every_channel_may_have_a_table_of_its_own() -> None:
    tables = table("sigmoid", 8.0, 7), table("tanh", 8.0, 7)
    q = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (9, 3))
    found = interpolated(q, tables, 7, np.array([1, 0, 1]))
    for channel, number in enumerate((1, 0, 1)):
        alone = interpolated(q[:, channel], (tables[number],), 7)
        assert np.array_equal(found[:, channel], alone)
