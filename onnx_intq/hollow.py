"""A model without the values of its large weights, and these apart: nothing is copied.

A `ModelProto` with its weights is a copy of them; building it takes two more, serializing it
another. Checks need the structure alone, files can be written weight by weight, and onnxruntime can
read the weights where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

SMALL = 1024
"""Constants of up to this many values may be shapes or axes, which inference needs."""
INITIALIZER, GRAPH, RAW_DATA = 5, 7, 9
"""Numbers of the fields in GraphProto, ModelProto and TensorProto: onnx.proto."""
LENGTH_DELIMITED = 2
"""Protobuf's wire type of bytes and messages."""
PLAIN = frozenset("?bBhHiIlLqQefd")
"""NumPy's types whose bytes are those of ONNX's raw data."""
BELOW_BYTE = frozenset({"int4", "uint4", "int2", "uint2"})
"""Types of which ONNX stores several in a byte, and NumPy one."""


@dataclass(frozen=True)
class Hollow:
    """A model and its large weights.

    Attributes:
        model: As exported, but for the values of the weights in `weights`: there, its tensors have
            a name, a type and dimensions alone.
        weights: The arrays of the graph it was made of, by the tensors' names.
    """

    model: onnx.ModelProto
    weights: dict[str, npt.NDArray[Any]]

    def filled(self) -> onnx.ModelProto:
        """The model itself, with the weights' values copied into it."""
        self._fill(self.model.graph)
        return self.model

    def referring(self) -> onnx.ModelProto:
        """The model, whose hollow tensors say that their values come from elsewhere."""
        self.fill_bodies(self.model.graph)
        for tensor in self._hollow(self.model.graph):
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=tensor.name)
        return self.model

    def _fill(self, graph: onnx.GraphProto) -> None:
        for tensor in self._hollow(graph):
            tensor.raw_data = self.weights[tensor.name].tobytes()
        self.fill_bodies(graph)

    def fill_bodies(self, graph: onnx.GraphProto) -> None:
        """Copy the values into the bodies of nodes, which repeat the constants they read."""
        for node in graph.node:
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    self._fill(body)

    def _hollow(self, graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        for tensor in graph.initializer:
            if tensor.name in self.weights and is_hollow(tensor):
                yield tensor

    def write(self, path: Path) -> None:
        """Write the filled model to a file in protobuf's canonical form, weight by weight.

        Law: the bytes are those of `filled().SerializeToString(deterministic=True)`.
        """
        graph = self.model.graph
        self.fill_bodies(graph)
        before, after = _serialized(graph, INITIALIZER)
        heads = [self._head(tensor) for tensor in graph.initializer]
        size = len(before) + len(after) + sum(len(h) + n for h, n in heads)
        first, last = _serialized(self.model, GRAPH)
        with path.open("wb") as file:
            file.write(first + _tag(GRAPH) + _varint(size) + before)
            for tensor, (head, rest) in zip(graph.initializer, heads, strict=True):
                file.write(head)
                if rest:
                    file.write(np.ascontiguousarray(self.weights[tensor.name]).data)
            file.write(after + last)

    def _head(self, tensor: onnx.TensorProto) -> tuple[bytes, int]:
        """What stands in the graph's field before a tensor's values, and the bytes of these."""
        content, size = tensor.SerializeToString(deterministic=True), 0
        if tensor.name in self.weights and is_hollow(tensor):
            size = self.weights[tensor.name].nbytes
            content += _tag(RAW_DATA) + _varint(size)
        return _tag(INITIALIZER) + _varint(len(content) + size) + content, size


def hollow(graph: gs.Graph) -> Hollow:
    """Export `graph`, which must be sorted, without copying its large weights."""
    with _packed(graph), _emptied(graph) as weights:
        return Hollow(gs.export_onnx(graph), weights)


def hollowed(model: onnx.ModelProto) -> Hollow:
    """A hollow copy of `model`, its weights in arrays of their own."""
    kept, weights = list[onnx.TensorProto](), dict[str, npt.NDArray[Any]]()
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > SMALL and _is_plain(tensor.data_type):
            kept.append(_without_values(tensor.name, tensor.data_type, tensor.dims))
            weights[tensor.name] = np.array(onnx.numpy_helper.to_array(tensor))
        else:
            kept.append(tensor)
    graph = onnx.GraphProto(initializer=kept, **_fields(model.graph, INITIALIZER))
    return Hollow(onnx.ModelProto(graph=graph, **_fields(model, GRAPH)), weights)


def bare_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose large weights are inputs: small, whatever the model's size.

    For checks and conversions, which copy the whole model and stop at protobuf's 2 GiB.
    """
    inputs = {value.name for value in model.graph.input}
    bare = onnx.GraphProto(**_fields(model.graph, INITIALIZER))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            bare.initializer.append(tensor)
        elif tensor.name not in inputs:
            bare.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return onnx.ModelProto(graph=bare, **_fields(model, GRAPH))


def is_hollow(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor of an exported model has no values although it should."""
    return math.prod(tensor.dims) > SMALL and not (
        tensor.raw_data or tensor.float_data or tensor.int32_data or tensor.int64_data
    )


def is_empty(tensor: gs.Tensor) -> bool:
    """Whether a tensor imported from a hollow model is one whose values are apart."""
    values = vars(tensor).get("_values")
    return isinstance(values, LazyValues) and is_hollow(values.tensor)


@contextmanager
def _emptied(graph: gs.Graph) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """While it lasts, the graph's own large constants have no values."""
    found = {id(t): t for t in graph.tensors().values() if _is_large(t)}.values()
    kept = [(tensor, tensor.values) for tensor in found]
    try:
        for tensor, values in kept:
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor.values = LazyValues(_without_values(tensor.name, kind, values.shape))
        yield {tensor.name: values for tensor, values in kept}
    finally:
        for tensor, values in kept:
            tensor.values = values


@contextmanager
def _packed(graph: gs.Graph) -> Iterator[None]:
    """While it lasts, constants of less than a byte per value are as in a file, bodies included.

    graphsurgeon (0.6.1) keeps such a constant as it was read, but cannot pack one.
    """
    graphs = [graph, *graph.subgraphs(recursive=True)]
    found = {id(t): t for g in graphs for t in g.tensors().values() if _is_below_byte(t)}.values()
    kept = [(tensor, tensor.values) for tensor in found]
    try:
        for tensor, values in kept:
            tensor.values = LazyValues(onnx.numpy_helper.from_array(values, tensor.name))
        yield
    finally:
        for tensor, values in kept:
            tensor.values = values


def _is_below_byte(tensor: gs.Tensor) -> bool:
    if not isinstance(tensor, gs.Constant):
        return False
    found = vars(tensor)["_values"]  # as `tensor.values` reads what is still in a file
    return isinstance(found, np.ndarray) and found.dtype.name in BELOW_BYTE


def _is_large(tensor: gs.Tensor) -> bool:
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) <= SMALL:
        return False
    found = vars(tensor)["_values"]  # as `tensor.values` reads what is still in a file
    return isinstance(found, np.ndarray) and found.dtype.char in PLAIN


def _is_plain(kind: int) -> bool:
    known = kind in onnx.helper.get_all_tensor_dtypes() and kind != onnx.TensorProto.UNDEFINED
    return known and onnx.helper.tensor_dtype_to_np_dtype(kind).char in PLAIN


def _without_values(name: str, kind: int, dims: Sequence[int]) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=kind, dims=dims)


def _fields(message: Any, left_out: int) -> dict[str, Any]:
    """The fields of a protobuf message that are set, but the one of that number."""
    return {f.name: value for f, value in message.ListFields() if f.number != left_out}


def _serialized(message: Any, number: int) -> tuple[bytes, bytes]:
    """The fields of a message before field `number`, and those behind it."""
    fields = message.ListFields()
    sides = (
        [p for p in fields if p[0].number < number],
        [p for p in fields if p[0].number > number],
    )
    before, after = (type(message)(**{field.name: v for field, v in side}) for side in sides)
    return before.SerializeToString(deterministic=True), after.SerializeToString(deterministic=True)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    """An unsigned number, 7 bits to a byte, low ones first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
