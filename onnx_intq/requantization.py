"""The fastest node sequence that requantises an accumulator exactly as `grid.requantize` does.

Dyadic requantisation is a step function of the accumulator, with at most 255 steps for an 8-bit
result. In int32, floor((factor * acc + offset) / divisor) is one, too; where all steps of both lie
at the same integers they are the same function. Continued fractions find such a ratio, the
comparison of the steps proves it, and int32 division takes onnxruntime a third of int64's time.
What has no such ratio (results of 16 bits, and most accumulators of 16-bit inputs) is multiplied
and shifted in int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.grid import MULTIPLIER_BITS, Dyadic, Grid, requantize
from onnx_intq.transform import IntqError
from onnx_intq.value import Value

Int64 = npt.NDArray[np.int64]

WRAP = 256
"""Cast to int8 wraps: y + 256, which is positive, becomes y."""
PRECISION = 2.0**-20
"""Relative; the product of three float32 scales is hardly known better."""
SHIFTS = 16
"""Steps to try between a multiplier and `PRECISION` off it, on either side."""
LEAST_BITS = 21
"""Of a multiplier: rounded to them, it is `PRECISION` / 2 off at most."""
TOO_LARGE = (
    "an accumulator exceeds {} bits; expected fewer or smaller products; keep the node float"
)
FEW = 4
"""Channels without a division that are worth a search for a friendly one."""
CONVERGENTS = 24
"""Of a continued fraction; denominators grow as Fibonacci's numbers at least: beyond 2^16."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A requantisation, one entry per channel.

    Attributes:
        multiplier: b and c, shape [channels].
        bias: int64 [channels], added to the accumulator.
        low: int64 [channels], the lowest accumulator there can be, bias excluded.
        high: int64 [channels], the highest.
        zero_point: Of the result.
        first: The lowest result, not below the grid.
        last: The highest result.
    """

    multiplier: Dyadic
    bias: Int64
    low: Int64
    high: Int64
    zero_point: int
    first: int
    last: int

    def thresholds(self) -> Int64:
        """Lowest accumulators that give at least first + 1, ..., last: [channels, last - first]."""
        b, c = np.maximum(self.multiplier.b[:, None], 1), self.multiplier.c[:, None]
        levels = np.arange(self.first + 1, self.last + 1, dtype=np.int64)[None, :]
        reach = ((levels - self.zero_point) << c) - (np.int64(1) << (c - 1))
        return -(-reach // b) - self.bias[:, None]


@dataclass(frozen=True)
class Division:
    """floor((factor * acc + offset) / divisor), one entry per channel, all in int32."""

    factor: Int64
    offset: Int64
    divisor: Int64


def division(step: Step, base: int) -> Division | None:
    """The int32 division that equals `step` for every accumulator, plus `base` - first.

    Args:
        step: What to compute.
        base: What the lowest result is shifted to, >= 0: below it, truncation equals floor.

    Returns:
        None where some channel has no such division.
    """
    found, channels = _search(step, base)
    return None if channels.size else Division(*found)


def fitted(step: Step) -> Step:
    """`step` with as many bits in its multipliers as an accumulator and its bias leave of 62.

    Up to 31 bits, `grid.requantize` takes multipliers of 31. An accumulator of L bits takes 62 - L,
    at least 21 for `PRECISION`: |acc + bias| * b < 2^L * 2^(62-L), and the zero point and the half
    it adds are below 2^62 as ever, so the sum fits int64. Sums of K products of 16 bits and 8
    have L <= 16 + 7 + log2(K), or 34 for K = 2,048.

    Raises:
        IntqError: They leave less than 21.
    """
    if _bits(step) < 32:
        return step
    largest = np.maximum(np.abs(step.low), np.abs(step.high)).max() + np.abs(step.bias).max()
    bits = 62 - int(largest).bit_length()
    if bits < LEAST_BITS:
        raise IntqError(TOO_LARGE.format(62 - LEAST_BITS))
    b, c = step.multiplier.b, step.multiplier.c
    spare = np.maximum(np.frexp(b.astype(np.float64))[1] - bits, 0)
    spare = np.minimum(spare.astype(np.int64), np.maximum(c - 2, 0))
    rounded = (b + (np.int64(1) << spare >> 1)) >> spare
    carried = (rounded == 1 << bits).astype(np.int64)  # rounded up to a power of two
    return replace(step, multiplier=Dyadic(rounded >> carried, c - spare - carried))


def _bits(step: Step) -> int:
    """Of the largest accumulator, with its bias or without, the sign excluded."""
    ends = np.stack([step.low, step.high, step.low + step.bias, step.high + step.bias])
    return int(np.abs(ends).max()).bit_length()


def friendly(step: Step, base: int) -> Step:
    """`step` with multipliers moved by up to `PRECISION` where only that gives them a division.

    About one channel in 10,000 needs it: where its steps fall on whole accumulators, the last bits
    of the dyadic multiplier decide on which side, and no small ratio follows them.
    """
    _, channels = _search(step, base)
    for shift in (s * sign for s in range(1, SHIFTS + 1) for sign in (1, -1)):
        if not channels.size:
            break
        b = step.multiplier.b.copy()
        moves = np.fix(b[channels] * (shift * PRECISION / SHIFTS)).astype(np.int64)
        b[channels] = np.minimum(b[channels] + moves, (1 << MULTIPLIER_BITS) - 1)
        moved = replace(step, multiplier=Dyadic(b, step.multiplier.c))
        _, still = _search(_only(moved, channels), base)
        b[channels[still]] = step.multiplier.b[channels[still]]
        step, channels = replace(moved, multiplier=Dyadic(b, step.multiplier.c)), channels[still]
    return step


def _divisible(step: Step, base: int) -> tuple[Step, Division | None]:
    """`step` and its division; a `friendly` step where but a few channels lack one.

    Where many do, steps are of so many accumulators that small ratios do not follow them, as with
    inputs of 16 bits: neither would they after a move.
    """
    found, channels = _search(step, base)
    if len(channels) > max(FEW, len(step.bias) // 8):
        return step, None
    if not channels.size:
        return step, Division(*found)
    step = friendly(step, base)
    return step, division(step, base)


def _only(step: Step, channels: Int64) -> Step:
    """The step of some channels."""
    return replace(
        step,
        multiplier=Dyadic(step.multiplier.b[channels], step.multiplier.c[channels]),
        bias=step.bias[channels],
        low=step.low[channels],
        high=step.high[channels],
    )


def _search(step: Step, base: int) -> tuple[Int64, Int64]:
    """Factor, offset and divisor [3, channels], and the channels that have none."""
    found = np.zeros((3, len(step.bias)), np.int64)
    lowest, highest = _requantized(step, step.low), _requantized(step, step.high)
    constant = lowest == highest
    found[1], found[2] = lowest - step.first + base, 1
    channels, thresholds = np.flatnonzero(~constant), step.thresholds()
    if not channels.size:  # there may be no threshold at all
        return found, channels
    for factor in _factors(step, thresholds, base):
        if not channels.size:
            break
        solved, solution = _solve(step, thresholds, factor, channels, base)
        found[:, channels[solved]] = solution[:, solved]
        channels = channels[~solved]
    return found, channels


def _requantized(step: Step, acc: Int64) -> Int64:
    limits = {"zero_point": step.zero_point, "low": step.first, "high": step.last}
    result: Int64 = requantize(acc, step.multiplier, bias=step.bias, **limits)
    return result


def _width(step: Step) -> npt.NDArray[np.float64]:
    """Accumulators from one step to the next; no more than there are."""
    between = np.ldexp(1.0, step.multiplier.c) / np.maximum(step.multiplier.b, 1)
    width: npt.NDArray[np.float64] = np.minimum(between, step.high - step.low + 1.0)
    return width


def _factors(step: Step, thresholds: Int64, base: int) -> Iterator[Int64]:
    """Candidate factors, [channels] each, best first: multiples of convergents' denominators."""
    # Offset / factor is about y * width - t for any step at t to y; one that is reached will do.
    low, high = step.low[:, None], step.high[:, None]
    index = np.argmax((thresholds > low) & (thresholds <= high), axis=1)
    width = _width(step)
    shift = width * (base + 1 + index) - np.take_along_axis(thresholds, index[:, None], 1)[:, 0]
    ends = np.stack([step.low, step.high, shift, step.low + shift, step.high + shift])
    largest = (((1 << 31) - 1) / (np.abs(ends).max(axis=0) + width + 1)).astype(np.int64)
    denominators = list(_denominators(step.multiplier))
    yield from (np.minimum(denominator, largest) for denominator in denominators[:2])
    for denominator in reversed(denominators):
        yield np.where(denominator <= largest, denominator * (largest // denominator), 0)
    for smaller in range(64):
        yield np.maximum(largest - smaller, 0)


def _denominators(multiplier: Dyadic) -> Iterator[Int64]:
    """Denominators of the convergents of 2^c / b, exactly: [channels] each."""
    below: Int64 = multiplier.b.astype(np.int64)
    above: Int64 = (np.int64(1) << multiplier.c).astype(np.int64)
    before, now = np.zeros_like(below), np.ones_like(below)
    yield now
    for _ in range(CONVERGENTS):
        above, below = below, above % np.maximum(below, 1)
        quotient = above // np.maximum(below, 1)
        quotient = np.minimum(quotient, (1 << 31) // np.maximum(now, 1))
        before, now = now, np.where(below > 0, quotient * now + before, now)
        yield now


def _solve(
    step: Step, thresholds: Int64, factors: Int64, channels: Int64, base: int
) -> tuple[npt.NDArray[np.bool_], Int64]:
    """Which of `channels` have an offset for their factor; factor, offset, divisor [3, channels].

    A step at t needs divisor * y - factor * t <= offset < divisor * y - factor * (t - 1).
    """
    factor = factors[channels]
    divisor = np.rint(factor * _width(step)[channels]).astype(np.int64)
    low, high = step.low[channels, None], step.high[channels, None]
    t, k = thresholds[channels], factor[:, None]
    levels = divisor[:, None] * np.arange(base + 1, base + 1 + t.shape[1], dtype=np.int64)
    far = np.int64(1) << 40
    reached = np.where(t <= high, levels - k * np.maximum(t, low), -far).max(axis=1, initial=-far)
    before = np.where(t > low, levels - k * np.minimum(t - 1, high) - 1, far).min(
        axis=1, initial=far
    )
    offset = np.clip(np.zeros_like(reached), reached, np.maximum(before, reached))
    ends = np.stack([factor * low[:, 0], factor * high[:, 0]])
    ends = np.concatenate([ends, ends + offset, offset[None], divisor[None]])
    fits = (np.abs(ends) < 1 << 31).all(axis=0)
    solved = (factor > 0) & (divisor > 0) & (reached <= before) & fits
    return solved, np.stack([factor, offset, divisor])


def emit(acc: Value, step: Step, grid: Grid, shape: tuple[int, ...]) -> Value:
    """Requantise `acc` to `grid`, in int32 where that is proven exact, else in int64.

    An accumulator of over 32 bits costs the multiplier as many of its 31 bits: see `fitted`.

    Args:
        acc: The accumulator; each channel within step.low..step.high.
        step: One entry per channel, or one for all.
        grid: The result's integers.
        shape: What a per-channel array is reshaped to, to broadcast to `acc`.

    Raises:
        IntqError: The accumulator can exceed its type, or `LARGEST_BITS` bits with its bias.
    """
    if acc.dtype == np.int32 and max(-int(step.low.min()), int(step.high.max())) >= 1 << 31:
        raise IntqError(TOO_LARGE.format(32))
    step = fitted(step)
    base = step.first + (WRAP if grid.signed else 0)
    found = None
    if grid.bits <= 8 and _bits(step) < 32:
        step, found = _divisible(step, base)
    if found is None and (shifted := emit_shift(acc, step, grid, shape)) is not None:
        return shifted
    if found is None:
        multiplier = Dyadic(step.multiplier.b.reshape(shape), step.multiplier.c.reshape(shape))
        limits: dict[str, Any] = {"low": step.first, "high": step.last}
        bias = step.bias.reshape(shape)
        result = requantize(acc, multiplier, bias=bias, zero_point=step.zero_point, **limits)
        return acc.builder.value(result.astype(grid.dtype), step.first, step.last)
    return _emit_division(acc, found, base, step, grid, shape)


def emit_shift(acc: Value, step: Step, grid: Grid, shape: tuple[int, ...]) -> Value | None:
    """`grid.requantize` by a shift of bits, which onnxruntime has for unsigned integers alone.

    Each channel is raised by a multiple of 2^c that makes its lowest sum positive, and lowered
    after the shift. That takes half the time of a comparison with 0 and a division of int64.

    Returns:
        None where a sum or a result may leave its type; or for TensorRT, which has no shift.
    """
    b, c, low, high, bias = (
        x.astype(object)
        for x in (step.multiplier.b, step.multiplier.c, step.low, step.high, step.bias)
    )
    offset = bias * b + (1 << (c - 1)) + ((step.zero_point - step.first) << c)
    raised = np.maximum(-((low * b + offset) >> c), 0)
    offset = offset + (raised << c)
    largest = np.abs([low * b, high * b, offset, high * b + offset]).max()
    most, down = (high * b + offset) >> c, step.first - raised
    build, last = acc.builder, max(most.max(), np.abs(down).max())
    if largest >= 1 << 63 or last >= 1 << 30 or build.target == "tensorrt":
        return None
    tensor: gs.Tensor = acc.astype(np.int64)
    for op, values in (("Mul", b), ("Add", offset)):
        constant = build.constant(values.astype(np.int64).reshape(shape), np.int64)
        tensor = build.node(op, [tensor, constant], np.int64, acc.tensor.shape)
    bits = build.constant(c.astype(np.uint64).reshape(shape), np.uint64)
    inputs = [build.value(tensor, 0, int((high * b + offset).max())).astype(np.uint64), bits]
    tensor = build.node("BitShift", inputs, np.uint64, acc.tensor.shape, direction="RIGHT")
    value: Any = build.value(build.value(tensor, 0, int(most.max())).astype(np.int32), 0, last)
    value = value + down.astype(np.int64).reshape(shape)
    return build.value(
        np.clip(value, step.first, step.last).astype(grid.dtype), step.first, step.last
    )


def _emit_division(
    acc: Value, found: Division, base: int, step: Step, grid: Grid, shape: tuple[int, ...]
) -> Value:
    if (found.factor != 1).any():
        factor = acc.builder.constant(found.factor.reshape(shape), np.int32)
        inputs = [acc.astype(np.int32), factor]
        product = acc.builder.node("Mul", inputs, np.int32, acc.tensor.shape)
        acc = acc.builder.value(product, -(1 << 31), (1 << 31) - 1)
    offset, divisor = found.offset.reshape(shape), found.divisor.reshape(shape)
    return divided(acc, offset, divisor, range(step.first, step.last + 1), base, grid)


def divided(
    total: Value,
    offset: npt.ArrayLike,
    divisor: npt.ArrayLike,
    results: range,
    base: int,
    grid: Grid,
) -> Value:
    """(total + offset) / divisor in int32, `base` standing for the lowest result, cut to `results`.

    Div truncates, which is floor where it matters: what is negative is below `base` >= 0. For
    target integer, the last Cast wraps, so that a result raised by `WRAP` needs no subtraction.
    """
    build, tensor = total.builder, total.astype(np.int32)
    for op, values in (("Add", offset), ("Div", divisor)):
        constant = build.constant(values, np.int32)
        tensor = build.node(op, [tensor, constant], np.int32, total.tensor.shape)
    ends = base, base + len(results) - 1
    limits = [build.constant(np.asarray(end), np.int32) for end in ends]
    clipped = build.node("Clip", [tensor, *limits], np.int32, total.tensor.shape)
    found: Any = build.value(clipped, *ends)
    if build.target == "tensorrt":
        found = found - (base - results[0])
    return build.value(found.astype(grid.dtype, wrap=True), results[0], results[-1])
