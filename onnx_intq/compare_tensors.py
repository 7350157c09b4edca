"""What the tensors of a float, QDQ or integer-only model mean, under the names of the float model.

A float tensor stands for itself. One that passes a QuantizeLinear is read as the integers behind
it, whatever the tool called them: the names come from the graph's structure. The metadata of an
integer-only model say which integer tensor holds which float one.
Law: `real` of what `store` makes is within half a step inside the grid's range.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.feeds import Batch, TensorSpec
from onnx_intq.graph import metadata, producer
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.placement import FUSED, is_bias
from onnx_intq.transform import IntqError

Array = npt.NDArray[Any]
Kind = Literal["float", "QDQ", "integer"]

SAME_SCALE = 1e-6
"""Relative difference up to which two scales are one: float32 rounds to 6e-8."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model's tensor holds a float tensor: real = (integer - zero_point) * scale.

    Attributes:
        name: The float tensor's name.
        tensor: The name, in this model, of the tensor that holds the values.
        dtype: That tensor's type.
        scale: Of its grid; None where it holds real values. Integers that are no quantized values,
            such as lengths, have 1.
        zero_point: Of its grid.
    """

    name: str
    tensor: str
    dtype: np.dtype[Any]
    scale: float | None = None
    zero_point: int = 0

    def real(self, values: Array) -> npt.NDArray[np.float64]:
        """The real values, float64, of the tensor's values."""
        if self.scale is None:
            return values.astype(np.float64)
        real: npt.NDArray[np.float64] = self.steps(values) * np.float64(self.scale)
        return real

    def steps(self, values: Array) -> npt.NDArray[np.int64]:
        """The tensor's integers as int64 multiples of the scale."""
        return values.astype(np.int64) - self.zero_point

    def store(self, values: Array, held: Reading) -> Array:
        """The values of another model's tensor, which `held` reads, as this tensor would hold them.

        Integers of the same grid are kept; real values are rounded to this grid and clipped.
        """
        if self.scale is None:
            return held.real(values).astype(self.dtype)
        steps = held.steps(values) if self.shares_grid(held) else held.real(values) / self.scale
        low, high = (0, 1) if self.dtype.kind == "b" else _limits(self.dtype)
        stored: Array = np.clip(np.rint(steps) + self.zero_point, low, high).astype(self.dtype)
        return stored

    def shares_grid(self, other: Reading) -> bool:
        """Whether both hold integers of one scale, so that their steps compare."""
        if self.scale is None or other.scale is None:
            return False
        return abs(self.scale - other.scale) <= SAME_SCALE * self.scale


@dataclass(frozen=True, kw_only=True)
class View:
    """A graph and the readings of its tensors.

    Attributes:
        graph: Its nodes in topological order.
        kind: "QDQ" where activations are put on grids, "integer" where no operator but
            DequantizeLinear makes a float tensor besides.
        readings: In graph order; a float tensor held several times has several.
    """

    graph: gs.Graph
    kind: Kind
    readings: tuple[Reading, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph takes, in real units: an integer input with a grid counts as float32."""
        return tuple(
            TensorSpec(
                name=held.name if held else tensor.name,
                dtype=np.dtype(np.float32 if held and held.scale else tensor.dtype),
                shape=tuple(tensor.shape or ()),
            )
            for tensor, held in self._inputs()
        )

    def feeds(self, batch: Batch) -> Batch:
        """The graph's own feeds, of feeds in real units."""
        real = Reading(name="", tensor="", dtype=np.dtype(np.float32))
        return {
            tensor.name: held.store(batch[held.name], real)
            if held and held.scale
            else batch[tensor.name]
            for tensor, held in self._inputs()
        }

    def _inputs(self) -> Iterator[tuple[gs.Variable, Reading | None]]:
        held = {reading.tensor: reading for reading in self.readings}
        yield from ((tensor, held.get(tensor.name)) for tensor in self.graph.inputs)


def view(graph: gs.Graph) -> View:
    """Find what the tensors of `graph`, sorted topologically, mean; bodies are left out.

    Raises:
        IntqError: The metadata record grids, but not of the form expected.
    """
    recorded = _recorded_grids(graph)
    grids = recorded | {k: v for k, v in _qdq_grids(graph).items() if k not in recorded}
    hidden = _hidden(graph, grids)
    covered = {reading.name for reading in grids.values()}
    found = []
    for tensor, node in _tensors(graph):
        if tensor.name in grids:
            found.append(grids[tensor.name])
        elif _is_array(tensor) and not _is_hidden(tensor, node, hidden, covered, graph):
            scale = None if np.dtype(tensor.dtype).kind == "f" else 1.0
            found.append(_reading(tensor, tensor.name, scale))
    return View(graph=graph, kind=_kind(graph, grids), readings=tuple(found))


def counterpart(reading: Reading, found: Mapping[str, list[Reading]]) -> Reading | None:
    """The reading of another model to compare with: of the same grid if there is one, then real."""
    namesakes = found.get(reading.name, [])
    same = [other for other in namesakes if reading.shares_grid(other)]
    real = [other for other in namesakes if other.scale is None]
    return next(iter([*same, *real, *namesakes]), None)


def _kind(graph: gs.Graph, grids: Mapping[str, Reading]) -> Kind:
    made = [(tensor, node) for tensor, node in _tensors(graph) if node and _is_array(tensor)]
    floats = {node.op for tensor, node in made if np.dtype(tensor.dtype).kind == "f"}
    if not grids:
        return "float"
    return "QDQ" if floats - {qdq.DEQUANTIZE} else "integer"


def _recorded_grids(graph: gs.Graph) -> dict[str, Reading]:
    """The grids of the metadata whose tensors the graph has."""
    text = metadata(graph).get(GRIDS_KEY)
    tensors = {tensor.name: tensor for tensor, _ in _tensors(graph) if _is_array(tensor)}
    try:
        entries = json.loads(text or "{}").items()
        return {
            tensor: _reading(tensors[tensor], str(name), float(scale), int(zero_point))
            for tensor, (name, scale, zero_point) in entries
            if tensor in tensors and float(scale) > 0
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise IntqError(
            f"metadata {GRIDS_KEY} cannot be read ({error}); expected "
            "{integer tensor: [float tensor, scale, zero point]}; quantize the model again"
        ) from error


def _qdq_grids(graph: gs.Graph) -> dict[str, Reading]:
    """The outputs of QuantizeLinear on activations with one constant scale."""
    found = {}
    for node in graph.nodes:
        if node.op != qdq.QUANTIZE or isinstance(node.inputs[0], gs.Constant):
            continue
        scale, zero_point = qdq.scale(node), qdq.zero_point(node)
        name = qdq.integer_type(node)
        if scale is None or scale.size != 1 or name.lstrip("u") not in {"int8", "int16", "int32"}:
            continue
        found[node.outputs[0].name] = Reading(
            name=_float_name(graph, node),
            tensor=node.outputs[0].name,
            dtype=np.dtype(name),
            scale=float(scale.item()),
            zero_point=int(zero_point.item()) if zero_point is not None else 0,
        )
    return found


def _float_name(graph: gs.Graph, quantize: gs.Node) -> str:
    """What a pair's tensor is called: where it is an output of the graph, as that, else as read."""
    outputs = {id(tensor) for tensor in graph.outputs}
    readers = quantize.outputs[0].outputs
    results = [n.outputs[0] for n in readers if n.op == qdq.DEQUANTIZE]
    names = [tensor.name for tensor in results if id(tensor) in outputs]
    return str([*names, quantize.inputs[0].name][0])


def _hidden(graph: gs.Graph, grids: Mapping[str, Reading]) -> set[str]:
    """Float tensors that exist only to be quantized, or are inside a fused operator that is."""
    outputs = {id(tensor) for tensor in graph.outputs}
    hidden: set[str] = set()

    def goes_in(reader: gs.Node, tensor: gs.Tensor) -> bool:
        if reader.op == qdq.QUANTIZE:
            return reader.outputs[0].name in grids
        fuses = (reader.op in FUSED and reader.inputs[0] is tensor) or is_bias(reader)
        return fuses and len(tensor.outputs) == 1 and reader.outputs[0].name in hidden

    for tensor, _ in reversed(list(_tensors(graph))):
        readers = tensor.outputs if id(tensor) not in outputs else []
        if readers and all(goes_in(reader, tensor) for reader in readers):
            hidden.add(tensor.name)
    return hidden


def _is_hidden(
    tensor: gs.Tensor, node: gs.Node | None, hidden: set[str], covered: set[str], graph: gs.Graph
) -> bool:
    """Whether a tensor without a grid is no reading of its own."""
    output = any(tensor is t for t in graph.outputs)
    if np.dtype(tensor.dtype).kind != "f":  # lengths, which are compared as they are
        return not output or node is None
    if node is not None and node.op == qdq.DEQUANTIZE:
        return not output or tensor.name in covered
    return tensor.name in hidden


def _is_array(tensor: gs.Tensor) -> bool:
    """Whether NumPy has the type, and it is a number."""
    dtype = tensor.dtype
    known = dtype is not None and not isinstance(dtype, int) and tensor.type == "tensor_type"
    return known and np.dtype(dtype).kind in "fiub"


def _tensors(graph: gs.Graph) -> Iterator[tuple[gs.Variable, gs.Node | None]]:
    """The inputs and the tensors that nodes make, in order."""
    yield from ((tensor, None) for tensor in graph.inputs)
    for node in graph.nodes:
        yield from ((tensor, producer(tensor)) for tensor in node.outputs if tensor.name)


def _reading(tensor: gs.Tensor, name: str, scale: float | None, zero_point: int = 0) -> Reading:
    dtype = np.dtype(tensor.dtype)
    return Reading(name=name, tensor=tensor.name, dtype=dtype, scale=scale, zero_point=zero_point)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    found = np.iinfo(dtype)
    return int(found.min), int(found.max)
