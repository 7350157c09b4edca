"""Hooks that run after every pass: the graph is well formed, and computes what it did before.

A pass cannot weaken its own check: hooks are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.feeds import Batch
from onnx_intq.graph import bare_model, first_line, hollow_from_graph, subgraphs
from onnx_intq.real_io import RealSession
from onnx_intq.samples import specs
from onnx_intq.transform import Pass, PassError

EPSILON = float(np.finfo(np.float32).eps)
GROWTH = 16.0
"""Roundings a node may add to the result, in units of epsilon: accumulations in another order."""
NUMBERS = "biuf"
"""Kinds of NumPy types that have a difference: not texts."""

Outputs = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Drift:
    """How far an inexact pass moved the outputs: largest difference, and SQNR in decibels."""

    largest: float
    sqnr: float


def well_formed(spec: Pass, model: gs.Graph) -> None:
    """Check names, operators, attributes, types and shapes of the whole graph.

    Raises:
        PassError: The graph is not valid ONNX; the message is the checker's.
    """
    try:
        _check_names(model)
        onnx.checker.check_model(bare_model(hollow_from_graph(model).model), full_check=True)
    except Exception as error:
        raise PassError(
            f"left an invalid graph: {first_line(error)}; this is a bug of {spec.name}"
        ) from error


def _check_names(model: gs.Graph) -> None:
    """Refuse two tensors of one name: written to a file, one would stand for both."""
    for sub in subgraphs(model):
        tensors = [t for node in sub.nodes for t in (*node.inputs, *node.outputs)]
        found: dict[str, gs.Tensor] = {}
        for tensor in (*sub.inputs, *sub.outputs, *tensors):
            if tensor.name and found.setdefault(tensor.name, tensor) is not tensor:
                raise PassError(f"two tensors are named {tensor.name!r}")


@dataclass
class SameFunction:
    """Runs the model in onnxruntime on small feeds after every pass.

    An exact pass must keep the outputs to float32 rounding, `GROWTH` * epsilon * nodes of the
    largest output; for an inexact one the drift is recorded.

    Attributes:
        feeds: What to run on.
        drifts: Pass name -> drift from the outputs before the first pass.
    """

    feeds: Batch
    drifts: dict[str, Drift] = field(default_factory=dict[str, Drift])
    _first: Outputs = field(default_factory=dict)
    _last: Outputs = field(default_factory=dict)

    def start(self, model: gs.Graph) -> None:
        """Record what the untouched model computes."""
        self._first = self._last = self._run(model)

    def __call__(self, spec: Pass, model: gs.Graph) -> None:
        """Compare with the outputs before the pass.

        Raises:
            PassError: An exact pass moved an output, or the model no longer runs.
        """
        now = self._run(model)
        if spec.exact:
            self._compare(spec, now, len(model.nodes))
        else:
            self.drifts[spec.name] = drift(self._first, now)
        self._last = now

    def drift_of(self, model: gs.Graph) -> Drift:
        """How far `model` is from the untouched one."""
        return drift(self._first, self._run(model))

    def _run(self, model: gs.Graph) -> Outputs:
        return RealSession(hollow_from_graph(model)).run(self.feeds)

    def _compare(self, spec: Pass, now: Outputs, nodes: int) -> None:
        if set(now) != set(self._last):
            raise PassError(f"changed the outputs' names; this is a bug of {spec.name}")
        for name, before in self._last.items():
            reach = float(np.abs(_finite(before)).max(initial=0.0))
            allowed = GROWTH * EPSILON * max(nodes, 1) * max(reach, 1.0)
            moved = float(_difference(before, now[name]).max(initial=0.0))
            if moved > allowed:
                raise PassError(
                    f"moved output {name!r} by {moved:.3g} > {allowed:.3g} although it is exact; "
                    f"this is a bug of {spec.name}"
                )


def drift(before: Outputs, now: Outputs) -> Drift:
    """Largest difference and SQNR of `now` against `before`, over all floating-point outputs."""
    signal = noise = largest = 0.0
    for name, values in before.items():
        if values.dtype.kind != "f":
            continue
        error = _difference(values, now[name])
        largest = max(largest, float(error.max(initial=0.0)))
        noise += float(np.square(error).sum())
        signal += float(np.square(_finite(values)).sum())
    with np.errstate(divide="ignore"):
        return Drift(largest, 10 * float(np.log10(signal / noise)) if noise else np.inf)


def _difference(before: npt.NDArray[Any], now: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Absolute differences; infinite where only one is NaN, and where texts or shapes differ."""
    if before.shape != now.shape:
        return np.array([np.inf])
    if before.dtype.kind not in NUMBERS:
        return np.where(before == now, 0.0, np.inf)
    a, b = before.astype(np.float64), now.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    if values.dtype.kind not in NUMBERS:
        return np.zeros(0)
    numbers = values.astype(np.float64)
    return numbers[np.isfinite(numbers)]


def small_feeds(model: gs.Graph, *, frames: int = 256) -> Batch:
    """Feeds for a quick run: one sample; dynamic axes other than the first have `frames`.

    Axes that have the name of a first axis are batches, too: those of a recurrent layer's states.
    """
    batches = {spec.shape[0] for spec in specs(model) if spec.shape} - {None}
    shapes = {
        spec.name: tuple(
            size if isinstance(size, int) else (frames if axis and size not in batches else 1)
            for axis, size in enumerate(spec.shape)
        )
        for spec in specs(model)
    }
    return random_feeds(model, shapes)


def random_feeds(model: gs.Graph, shapes: Mapping[str, Sequence[int]], *, seed: int = 0) -> Batch:
    """Feeds of given shapes: standard normal features, full lengths, zeros for other integers.

    Args:
        model: Whose inputs to feed.
        shapes: One per input.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    frames = max((shape[-1] for shape in shapes.values() if len(shape) > 1), default=1)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for spec in specs(model):
        shape = tuple(shapes[spec.name])
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = np.full(shape, frames if spec.is_lengths else 0, spec.dtype)
    return feeds
