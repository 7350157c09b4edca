"""One step of an LSTM in integers: 8-bit weights and hidden state, 16-bit cell, Q3.12 gates.

After Li and Alvarez (arXiv:2101.05453) and TensorFlow Lite's 8x8_16 LSTM. With the gates in ONNX's
order i, o, f, g, sigmoid in Q0.16 and tanh in Q0.15:

    z = clip((Wx x + offset + Wh h) >> shift)          16 bits, 12 of them fractional
    c = clip((f c 2^m + i g) >> (16 + m))              16 bits, 15 - m of them fractional
    h = clip(o tanh(c) b >> s + zero point)            8 bits

Every result is rounded once, half up: the published form rounds the shares of x and h, and both
addends of c, apart. The cell's scale is a power of two, so that the steps of a state that is fed
back are the same on both sides. Mode "lut" takes both functions from tables of 513 entries, between
which it interpolates: off by 1e-4 at most, where "poly" is off by 1.2e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_intq.grid import dyadic
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.sigmoid import sigmoid, tanh
from onnx_intq.trace import bounded, take
from onnx_intq.transform import IntqError

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

FRACTION = 12
"""Fractional bits of the gates before their functions: -8 .. 8."""
UNIT = 15
"""Fractional bits of what tanh gives; sigmoid has one more."""
LOW, HIGH = -(1 << 15), (1 << 15) - 1
"""Of 16 bits."""
HIDDEN_BITS = 30
"""Of the hidden state's multiplier: a product of 32 bits leaves room for its offset in int64."""
LARGEST_SHIFT = 40
"""Of the gates: from there on multipliers have fewer than 31 bits, and errors are below 2^-12."""
SPACING = 7
"""Binary digits between two entries of a table: 1/32 at 12 fractional bits."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How sums of products become Q3.12.

    Attributes:
        input_factors: int64 [4 hidden], of the sums over the input.
        hidden_factors: int64 [4 hidden], of the sums over the hidden state.
        offset: int64 [4 hidden], the bias, half a step and `raised`.
        shift: Of the total.
        raised: By how much the shifted total is too high, so that no total is negative.
    """

    input_factors: Int64
    hidden_factors: Int64
    offset: Int64
    shift: int
    raised: int

    @classmethod
    def of(
        cls, input_steps: Float64, hidden_steps: Float64, bias: Float64, reach: tuple[int, int]
    ) -> Gates:
        """The factors of real steps.

        Args:
            input_steps: [4 hidden], real units per step of the sums over the input.
            hidden_steps: [4 hidden], of the sums over the hidden state.
            bias: [4 hidden], real.
            reach: The largest magnitudes of both sums.

        Raises:
            IntqError: A step is 2^18 or more, or the sums and the bias leave 62 bits.
        """
        steps = np.stack([input_steps, hidden_steps]) * 2.0**FRACTION
        shift = int(dyadic(steps.max(), LARGEST_SHIFT).c)
        factors = np.rint(np.ldexp(steps, shift)).astype(np.int64)
        addend = np.ldexp(bias, FRACTION + shift) + (1 << (shift - 1))
        farthest = sum(int(f.max()) * n for f, n in zip(factors, reach, strict=True))
        farthest += math.ceil(np.abs(addend).max())
        if farthest >= 1 << 61:
            raise IntqError(
                f"an LSTM's gates reach {farthest / 2.0 ** (shift + FRACTION):.3g}; expected less "
                "than 2^61 steps of their products; calibrate again"
            )
        raised = (farthest >> shift) + 1
        offset = np.rint(addend).astype(np.int64) + (raised << shift)
        return cls(
            input_factors=factors[0],
            hidden_factors=factors[1],
            offset=offset,
            shift=shift,
            raised=raised,
        )

    def of_input(self, products: Any) -> Any:
        """The input's share of all totals: [..., 4 hidden], int64; or a `trace.Value`."""
        return products * self.input_factors + self.offset

    def total(self, inputs: Any, products: Any) -> Any:
        """The gates in Q3.12, 16 bits.

        Args:
            inputs: `of_input`, [batch, 4 hidden].
            products: Sums over the hidden state, [batch, 4 hidden].
        """
        high = (inputs + products * self.hidden_factors) >> self.shift
        return np.clip(high, self.raised - HIGH, self.raised + HIGH) - self.raised


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An LSTM's step.

    Attributes:
        gates: Its gates.
        octaves: m: the cell holds -2^m .. 2^m, 2 to 15.
        scale: Of the hidden state, real units per step.
        zero_point: Of the hidden state.
        low: The lowest integer of the hidden state.
        high: The highest.
        mode: "poly", "paper" or "lut".
    """

    gates: Gates
    octaves: int
    scale: float
    zero_point: int
    low: int
    high: int
    mode: Mode = "poly"

    def step(self, inputs: Any, products: Any, c: Any) -> tuple[Any, Any]:
        """One step of time.

        Args:
            inputs: The input's share of the totals, `Gates.of_input`: int64 [batch, 4 hidden].
            products: Sums over the hidden state less its zero point: int64 [batch, 4 hidden].
            c: int64 [batch, hidden], 16 bits, 15 - m of them fractional. All may be `trace.Value`.

        Returns:
            The new hidden state, low .. high with its zero point, and cell: [batch, hidden] each.
        """
        i, o, f, g = np.split(self._activated(self.gates.total(inputs, products)), 4, axis=-1)
        c = self._cell(i, f, g, c)
        return self._hidden(o * self._tanh(c)), c

    def _activated(self, z: Any) -> Any:
        """Sigmoid of i, o and f, 16 fractional bits, and tanh of g, 15: both in one go."""
        last = np.repeat([0, 0, 0, 1], len(self.gates.offset) // 4)
        if self.mode != "lut":  # tanh(x) = 2 sigmoid(2 x) - 1
            doubled = z * (1 + last)
            return sigmoid(doubled, 2.0**-FRACTION, self.mode, UNIT + 1)[0] - (last << UNIT)
        sigmoids, tanhs = (table(name, 8.0, SPACING) for name in ("sigmoid", "tanh"))
        return interpolated(z, (sigmoids, tanhs), SPACING, last)

    def _tanh(self, c: Any) -> Any:
        """Of the cell, 15 fractional bits."""
        reach = 1 << self.octaves
        if self.mode != "lut":
            return tanh(c, reach / (1 << UNIT), self.mode)[0]
        spacing = max(1, SPACING - max(0, self.octaves - 3))
        return interpolated(c, (table("tanh", reach, spacing),), spacing)

    def _cell(self, i: Any, f: Any, g: Any, c: Any) -> Any:
        """Bounds: |f c| 2^m <= 2^(31 + m), |i g| <= 2^31: shifted, both are 2^15 at most."""
        shift = UNIT + 1 + self.octaves
        total = f * (c << self.octaves) + i * g
        up = (1 << 16 << shift) + (1 << (shift - 1))
        return np.clip(((total + up) >> shift) - (1 << 16), LOW, HIGH)

    def _hidden(self, products: Any) -> Any:
        """`grid.requantize` of 31 fractional bits; |products| <= 2^31 is known: no sign is left."""
        multiplier = dyadic(2.0 ** (-2 * UNIT - 1) / self.scale, bits=HIDDEN_BITS)
        b, c = int(multiplier.b), int(multiplier.c)
        raised = (b << (2 * UNIT + 1) >> c) + 1
        high = (products * b + ((1 << (c - 1)) + (raised << c))) >> c
        h = high + (self.zero_point - raised)
        # No Clip, which is left out where 2^31 just fits: intervals do not prove that 2^31.
        return np.minimum(np.maximum(h, self.low), self.high)


def unrolled(
    inputs: Int64, recurrence: Int64, h: Int64, c: Int64, cell: Cell
) -> tuple[Int64, Int64, Int64]:
    """All steps of a sequence: the reference.

    Args:
        inputs: The input's share of the totals, [time, batch, 4 hidden].
        recurrence: [4 hidden, hidden], zero points taken off.
        h: [batch, hidden], with its zero point.
        c: [batch, hidden].
        cell: What a step does.

    Returns:
        The hidden states [time, batch, hidden], and the last hidden state and cell.
    """
    states = np.empty((len(inputs), *h.shape), np.int64)
    for time, share in enumerate(inputs):
        h, c = cell.step(share, (h - cell.zero_point) @ recurrence.T, c)
        states[time] = h
    return states, h, c


def table(name: str, reach: float, spacing: int) -> Int64:
    """A function at every 2^spacing-th of 16 bits, the end included.

    Args:
        name: "sigmoid", in 16 fractional bits, or "tanh", in 15.
        reach: 16 bits stand for -reach .. reach.
        spacing: Binary digits between two entries.

    Returns:
        int64 [2^(16 - spacing) + 1].
    """
    x = np.linspace(-reach, reach, (1 << (16 - spacing)) + 1)
    y = np.tanh(x) if name == "tanh" else 1.0 + np.tanh(x / 2)
    return np.rint(np.ldexp(y, UNIT)).astype(np.int64)


def interpolated(
    q: Any, tables: tuple[Int64, ...], spacing: int, which: Int64 | None = None
) -> Any:
    """Growing functions between the entries of a `table` each: linear, rounded half up.

    Args:
        q: 16 bits, [..., channels]; or a `trace.Value` with these bounds.
        tables: As `table` gives them, of one length.
        spacing: As for `table`.
        which: The number of each channel's table, [channels]; None for the first.

    Returns:
        Integers of the shape of `q`.
    """
    up = q - LOW
    place = up >> spacing
    rest = bounded(up - (place << spacing), 0, (1 << spacing) - 1)  # what the floor left
    if which is not None:
        place = place + which * (len(tables[0]) - 1)
    starts = np.concatenate([each[:-1] for each in tables])
    rises = np.concatenate([np.diff(each) for each in tables])
    between = take(starts, place) + ((take(rises, place) * rest + (1 << spacing >> 1)) >> spacing)
    # The next power of two: where products just fit int32, intervals do not prove it.
    most = 1 << (int(max(np.abs(each).max() for each in tables)) - 1).bit_length()
    return bounded(between, -most, most)
