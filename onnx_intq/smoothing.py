"""Chooses factors for a group of channels by the error its products make once quantized.

A factor is (largest value of the channel) ** -beta * (largest weight that reads it) ** gamma;
SmoothQuant (2211.10438, equation 4) is beta + gamma = 1. The exponents are found by a search along
each; the error is that of the products' results on samples, activations and weights on their grids.
Factors are taken only if they lower the error on samples that took no part in the search, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq.channels import Group, Reading, has_weight, weight_axes
from onnx_intq.clipping import clipping_range
from onnx_intq.feeds import Batch
from onnx_intq.grid import Grid, affine, dequantize, quantize, symmetric, weight_grid, weight_scales
from onnx_intq.observe import Histogram
from onnx_intq.segments import Segments

Array = npt.NDArray[Any]
BETAS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
GAMMAS = (0.1, 0.25, 0.5)
ROWS = 1024
"""Values of each channel that are looked at."""
TESTED = 512
"""Of these, as many take part in measuring errors; the ranges are those of all."""
QUERIES = 64
"""Rows of the left factor of a product of activations, per head."""
FLOOR = 2.0**-6
"""No channel counts as smaller than this part of the largest: quiet ones are not blown up."""


@dataclass(frozen=True, kw_only=True)
class Grids:
    """What the products will be computed on.

    Attributes:
        activation: Of 8 bits; signed ones are symmetric.
        weight_bits: Width of the weights' grid.
        shift: How far channels of other data may reach beyond what the ranges are found on:
            standard deviation in octaves. Between synthetic data and speech it is 0.5.
    """

    activation: Grid = field(default_factory=lambda: Grid(8, signed=False))
    weight_bits: int = 8
    shift: float = 0.5

    def shifted(self, values: Array) -> Array:
        """The values as other data might have them."""
        octaves = np.random.default_rng(0).standard_normal(values.shape, np.float32)
        moved: Array = values * np.exp2(self.shift * octaves)
        return moved

    def round(self, values: Array, ranged: Array) -> Array:
        """`values` on the grid for the range of `ranged`, float32."""
        histogram = Histogram()
        histogram.update(ranged, "a sample")
        limits = clipping_range(histogram, "mse", self.activation)
        rule = symmetric if self.activation.signed else affine
        scale, zero_point = rule(*limits, self.activation)
        # As `grid.quantize`, in float32: this is the inner loop of the search.
        low, high = self.activation.low - zero_point, self.activation.high - zero_point
        rounded: Array = np.clip(np.rint(values * (1 / scale)), low, high) * scale
        return rounded


@dataclass(eq=False)
class Samples:
    """What is kept of the tensors: rows of what linear operators read, slices of other factors.

    Attributes:
        rows: Tensor name -> float32 [samples, channels].
        pairs: Name of a product of activations -> its factors, the left one with few rows.
    """

    rows: dict[str, Array] = field(default_factory=dict)
    pairs: dict[str, list[tuple[Array, Array]]] = field(default_factory=dict)


def collect(
    graph: gs.Graph, found: Sequence[Group], feeds: Iterable[Batch], *, seed: int = 0
) -> Samples:
    """Run `feeds` through `graph` once and keep a random sample of what the products read."""
    readings = [r for group in found for r in group.readings]
    linear = {r.node.inputs[0].name: r for r in readings if has_weight(r.node)}
    products = {r.node.name: r.node for r in readings if not has_weight(r.node)}
    names = {*linear, *(t.name for node in products.values() for t in node.inputs)}
    kept: dict[str, list[Array]] = {name: [] for name in linear}
    samples = Samples(pairs={name: [] for name in products})
    random, segments = np.random.default_rng(seed), Segments(graph, names, size=8)
    for batch in feeds:
        held: dict[str, Array] = {}
        waiting = dict(products)
        for name, values in segments.run(batch):
            if name in linear:
                kept[name].append(_some_rows(values, linear[name], random))
            if any(name == t.name for node in waiting.values() for t in node.inputs):
                held[name] = values
            for node in [n for n in waiting.values() if all(t.name in held for t in n.inputs)]:
                a, b = (held[t.name] for t in node.inputs)
                if len(samples.pairs[node.name]) < 2:
                    chosen = random.permutation(a.shape[-2])[:QUERIES]
                    samples.pairs[node.name].append((a[:1, ..., chosen, :].copy(), b[:1].copy()))
                del waiting[node.name]
            held = {
                n: v
                for n, v in held.items()
                if any(n == t.name for node in waiting.values() for t in node.inputs)
            }
    samples.rows = {
        name: random.permutation(np.concatenate(parts))[:ROWS] for name, parts in kept.items()
    }
    return samples


def choose(group: Group, samples: Samples, grids: Grids) -> tuple[Array | None, float]:
    """The factors with the least error.

    Args:
        group: From `channels.groups`.
        samples: From `collect`.
        grids: What the products will be computed on.

    Returns:
        float64 [group.size], None where nothing is better than none; and the error with them
        relative to that without.
    """
    high, low = _reaches(group, samples)
    judges = list(_judges(group, samples, grids))
    start = _total(judges, np.ones(group.size))
    best, least, exponents = None, start, (0.0, 0.0)
    for beta in BETAS:
        tried = high**-beta
        errors = _total(judges, tried)
        if errors[0] < least[0]:
            best, least, exponents = tried, errors, (beta, 0.0)
    for gamma in GAMMAS:
        tried = high ** -exponents[0] * low**gamma
        errors = _total(judges, tried)
        if errors[0] < least[0]:
            best, least = tried, errors
    ratio = float(least[1] / max(start[1], 1e-30))
    return (None, 1.0) if best is None or ratio > 0.98 else (best, ratio)


def _total(judges: Sequence[Any], factors: Array) -> Array:
    extended = np.append(factors, 1.0)  # FIXED is the last
    found: Array = np.sum([judge(extended) for judge in judges], axis=0)
    return found


def _some_rows(values: Array, reading: Reading, random: np.random.Generator) -> Array:
    axis = 1 if reading.node.op in {"Conv", "ConvTranspose"} else -1
    rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return rows[random.permutation(len(rows))[:ROWS]].astype(np.float32)


def _reaches(group: Group, samples: Samples) -> tuple[Array, Array]:
    """Of each channel: its largest value, and the largest of what multiplies it."""
    high, low = np.zeros(group.size + 1), np.zeros(group.size + 1)  # FIXED is the last
    for reading in group.readings:
        if has_weight(reading.node):
            values = np.abs(samples.rows[reading.node.inputs[0].name]).max(axis=0)
            np.maximum.at(high, reading.labels.reshape(-1), values)
            np.maximum.at(low, reading.labels.reshape(-1), _largest_weights(reading.node))
            continue
        for pair in samples.pairs[reading.node.name]:
            values = _largest(pair[reading.index], reading.labels)
            np.maximum.at(high if reading.power > 0 else low, reading.labels.reshape(-1), values)
    return _floored(high[:-1]), _floored(low[:-1])


def _largest(values: Array, labels: Array) -> Array:
    """The largest magnitude for each label, flat."""
    extra = tuple(i for i, size in enumerate(labels.shape) if size == 1)
    found: Array = np.abs(values).max(axis=extra).reshape(-1)
    return found


def _largest_weights(node: gs.Node) -> Array:
    """The largest weight that reads each input channel."""
    found: Array = np.abs(_matrix(node)).max(axis=(1, 2))
    return found


def _floored(reach: Array) -> Array:
    top = reach.max(initial=0.0)
    if top == 0:
        return np.ones_like(reach)
    found: Array = np.maximum(reach / top, FLOOR)
    return found


def _matrix(node: gs.Node) -> Array:
    """A weight as [input channels, output channels that read each, taps]."""
    w = node.inputs[1].values
    source, result = weight_axes(node)
    moved = np.moveaxis(w, (source, result), (0, 1))
    moved = moved.reshape(*moved.shape[:2], -1)
    group = node.attrs.get("group", 1)
    if group > 1:  # [C / group, O, k] -> [C, O / group, k]
        parts = moved.reshape(moved.shape[0], group, -1, moved.shape[2])
        moved = np.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])
    matrix: Array = moved
    return matrix


def _judges(group: Group, samples: Samples, grids: Grids) -> Iterator[Any]:
    """Functions from factors to the error on the two halves of the samples."""
    for reading in group.readings:
        if not has_weight(reading.node):
            continue
        rows = samples.rows[reading.node.inputs[0].name]
        if reading.node.attrs.get("group", 1) == 1:
            yield _Dense(reading, rows, grids)
        else:
            yield _Separate(reading, rows, grids)
    importance = _importance(group)
    seen: set[str] = set()
    for reading in group.readings:
        if not has_weight(reading.node) and reading.node.name not in seen:
            seen.add(reading.node.name)
            both = [r for r in group.readings if r.node is reading.node]
            yield _Product(both, samples.pairs[reading.node.name], grids, importance)


def _importance(group: Group) -> Array:
    """How much each channel counts in what the linear operators compute."""
    found = np.zeros(group.size + 1)
    for reading in group.readings:
        if has_weight(reading.node):
            np.add.at(
                found, reading.labels.reshape(-1), np.square(_matrix(reading.node)).sum((1, 2))
            )
    return found if found.any() else np.ones_like(found)


class _Dense:
    """The error of a linear operator: that of every tap alone, for noise is white."""

    def __init__(self, reading: Reading, rows: Array, grids: Grids) -> None:
        self._labels, self._power = reading.labels.reshape(-1), reading.power
        self._rows, self._grids = rows, grids
        self._w = _matrix(reading.node).astype(np.float32)  # [C, O, taps]
        self._tested = grids.shifted(rows[:TESTED])
        self._exact = self._tested @ self._w.reshape(len(self._w), -1)
        self._signal = float(np.square(self._exact).sum())

    def __call__(self, factors: Array) -> Array:
        f = (factors[self._labels] ** self._power).astype(np.float32)
        x = self._grids.round(self._tested * f, self._rows * f)
        w = self._w / f[:, None, None]
        scales = _scales(np.swapaxes(w, 0, 1), self._grids.weight_bits)
        integers = quantize(w, scales, 0, weight_grid(self._grids.weight_bits), 1)
        w = dequantize(integers, scales, 0, 1)
        error = np.square(x @ w.reshape(len(w), -1) - self._exact).sum(axis=1)
        return _relative(error, self._signal)


class _Separate:
    """The error of a grouped operator, whose weights have a scale for each channel."""

    def __init__(self, reading: Reading, rows: Array, grids: Grids) -> None:
        self._labels, self._power = reading.labels.reshape(-1), reading.power
        self._rows, self._grids, self._tested = rows, grids, grids.shifted(rows)
        self._weight = np.square(_matrix(reading.node)).sum((1, 2)) * _downstream(reading.node)
        self._signal = float((np.square(self._tested) * self._weight).sum())

    def __call__(self, factors: Array) -> Array:
        f = (factors[self._labels] ** self._power).astype(np.float32)
        noise = self._grids.round(self._tested * f, self._rows * f) / f - self._tested
        error = (np.square(noise) * self._weight).sum(axis=1)
        return _relative(error, self._signal)


class _Product:
    """The error of a product of activations."""

    def __init__(
        self,
        readings: Sequence[Reading],
        pairs: Sequence[tuple[Array, Array]],
        grids: Grids,
        importance: Array,
    ) -> None:
        self._readings, self._pairs, self._grids = readings, pairs, grids
        first = readings[0]
        inner = first.labels.shape[-1 if first.index == 0 else -2] > 1
        self._weight = 1.0 if inner else np.sqrt(importance[first.labels])
        self._tested = [tuple(grids.shifted(x) for x in pair) for pair in pairs]
        self._exact = [np.matmul(a, b) * self._weight for a, b in self._tested]
        self._signal = float(sum(np.square(y).sum() for y in self._exact))

    def __call__(self, factors: Array) -> Array:
        errors = []
        for pair, tested, exact in zip(self._pairs, self._tested, self._exact, strict=True):
            ranged, operands = list(pair), list(tested)
            back: Array = np.ones(())
            for reading in self._readings:
                f = (factors[reading.labels] ** reading.power).astype(np.float32)
                operands[reading.index] = operands[reading.index] * f
                ranged[reading.index] = ranged[reading.index] * f
                back = back / f if np.ndim(self._weight) else back
            a, b = map(self._grids.round, operands, ranged)
            noise = np.matmul(a, b) * back * self._weight - exact
            errors.append(np.square(noise).sum(axis=-1).reshape(-1))
        return _relative(np.concatenate(errors), self._signal)


def _relative(error: Array, signal: float) -> npt.NDArray[np.float64]:
    """The sums of both halves, relative to the signal."""
    half = len(error) // 2
    sums = np.array([error[:half].sum(), error[half:].sum()], np.float64)
    return sums / max(signal, float(np.finfo(np.float32).tiny))


def _downstream(node: gs.Node) -> Array | float:
    """How much each result of a depthwise convolution counts in the linear operator behind it."""
    result = node.outputs[0]
    while len(result.outputs) == 1 and result.outputs[0].op == "Relu":
        result = result.outputs[0].outputs[0]
    if len(result.outputs) != 1 or not has_weight(result.outputs[0]):
        return 1.0
    weights: Array = np.square(_matrix(result.outputs[0])).sum((1, 2))
    suits = len(weights) == len(_matrix(node))
    return weights if suits else 1.0


def _scales(w: Array, bits: int) -> Array:
    """One scale a row; where many bits are left, the search for the best is not worth its time."""
    return weight_scales(w, 0, bits, "minmax" if bits >= 8 else "mse")
