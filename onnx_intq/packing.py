"""Constants of few distinct integers as indices in bit planes, decoded by standard operators.

An index of b bits is cut into planes of 4, 2 and 1 bits, the low bits in the first. A plane of 4 is
a UINT4 tensor; of 2, UINT2 where the opset has it; else several lie in a byte, low bits first:

    plane [n / 8, 1] -> BitShift(right, 0..7) -> BitwiseAnd(1) -> Reshape (-> Slice -> Reshape)

Planes are put together by BitShift(left) and BitwiseOr; Cast and Gather look the index up in a
table of the distinct integers. Everything is constant: a runtime that folds constants decodes once.
Law: the result of the Gather is the constant, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names, producer, remove
from onnx_intq.integer_ops.program import compiled

Integers = npt.NDArray[np.integer[Any]]

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of an index -> widths of its planes, the lowest bits first."""
PLANE_OPSET, NIBBLE_OPSET, PAIR_OPSET = 18, 21, 25
"""Oldest opsets with BitwiseAnd, with UINT4, with UINT2."""
DECODING = {"Cast", "BitShift", "BitwiseAnd", "BitwiseOr", "Reshape", "Slice"}
"""Operators between stored planes and the Gather of the table."""
NODE_BYTES = 64
"""What a node takes in a file, about."""
LARGEST_TABLE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A constant that a graph decodes.

    Attributes:
        node: The Gather; its output has the constant's values.
        bits: Of its indices.
        stored: Every constant it is made from: planes, table, shifts, masks, shapes.
    """

    node: gs.Node
    bits: int
    stored: tuple[gs.Constant, ...]


def distinct(values: Integers) -> Integers:
    """The distinct values of an int8 or uint8 array, ascending."""
    counts = np.bincount(np.ascontiguousarray(values).view(np.uint8).ravel(), minlength=256)
    found: Integers = np.sort(np.flatnonzero(counts).astype(np.uint8).view(values.dtype))
    return found


def index_bits(values: Integers) -> int:
    """The bits of an index to the distinct values of an int8 or uint8 array, 1..8."""
    return max(1, (len(distinct(values)) - 1).bit_length())


def packed_bytes(values: Integers) -> int:
    """About what a constant takes in a file when it is packed, decoding included."""
    bits = index_bits(values)
    nodes = 2 + sum(4 if width < 4 else 1 for width in PLANES[bits]) if bits < 8 else 0
    return math.ceil(values.size * bits / 8) + (1 << bits) + nodes * NODE_BYTES


def required_opset(bits: int) -> int:
    """The oldest opset in which indices of so many bits can be decoded."""
    return NIBBLE_OPSET if bits > 3 else PLANE_OPSET


def bit_planes(indices: Integers, bits: int) -> list[npt.NDArray[np.uint8]]:
    """Cut indices into the planes of `PLANES`: uint8, the shape of `indices`."""
    found, shift = [], 0
    for width in PLANES[bits]:
        found.append((indices >> shift & ((1 << width) - 1)).astype(np.uint8))
        shift += width
    return found


def packed_bytes_of(plane: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Put a plane's values into bytes, low bits first, zeros behind the last.

    Args:
        plane: Values below 2^width, any shape.
        width: 1, 2 or 4.

    Returns:
        uint8 [bytes, 1].
    """
    share = 8 // width
    flat = np.zeros(-(-plane.size // share) * share, np.uint8)
    flat[: plane.size] = plane.ravel()
    shifted = flat.reshape(-1, share) << (width * np.arange(share, dtype=np.uint8))
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=1, keepdims=True)
    return packed.astype(np.uint8)


class Packer:
    """Puts packed constants and their decoding into a graph; equal tables and shapes once."""

    def __init__(self, graph: gs.Graph) -> None:
        """Pack for the opset that `graph` has now."""
        self._graph, self._names = graph, Names(graph)
        self._shared: dict[tuple[str, bytes, tuple[int, ...]], gs.Constant] = {}
        self._nodes: list[gs.Node] = []

    def decoded(self, values: Integers, name: str) -> gs.Variable:
        """A tensor of these values, at most 128 distinct ones; `name` must be free."""
        table = distinct(values)
        bits = max(1, (len(table) - 1).bit_length())
        planes = bit_planes(np.searchsorted(table, values), bits)
        index, shift = self._plane(planes[0], PLANES[bits][0]), PLANES[bits][0]
        for plane, width in zip(planes[1:], PLANES[bits][1:], strict=True):
            high = self._plane(plane, width)
            high = self._node("BitShift", [high, self._byte(shift)], direction="LEFT")
            index, shift = self._node("BitwiseOr", [index, high]), shift + width
        index = self._node("Cast", [index], np.int32, to=onnx.TensorProto.INT32)
        found = self._node("Gather", [self._constant(table), index], values.dtype)
        found.name, found.shape = name, values.shape
        return found

    def finish(self) -> None:
        """Put the nodes before all others of the graph."""
        self._graph.nodes[:0] = self._nodes

    def _plane(self, plane: npt.NDArray[np.uint8], width: int) -> gs.Variable:
        """uint8, the shape of `plane`."""
        dtype = {4: ml_dtypes.uint4, 2: ml_dtypes.uint2}.get(width)
        if dtype is not None and (width == 4 or self._graph.opset >= PAIR_OPSET):
            stored = gs.Constant(self._names.number("packed"), plane.astype(dtype))
            return self._node("Cast", [stored], to=onnx.TensorProto.UINT8)
        share = 8 // width
        packed = gs.Constant(self._names.number("packed"), packed_bytes_of(plane, width))
        shifts = self._constant(np.arange(0, 8, width, dtype=np.uint8))
        found = self._node("BitShift", [packed, shifts], direction="RIGHT")
        found = self._node("BitwiseAnd", [found, self._byte((1 << width) - 1)])
        if plane.size % share:
            flat = self._node("Reshape", [found, self._numbers([-1])])
            found = self._node("Slice", [flat, self._numbers([0]), self._numbers([plane.size])])
        return self._node("Reshape", [found, self._numbers(plane.shape)])

    def _byte(self, value: int) -> gs.Constant:
        return self._constant(np.asarray(value, np.uint8))

    def _numbers(self, values: Sequence[int]) -> gs.Constant:
        return self._constant(np.asarray(values, np.int64))

    def _constant(self, values: Integers) -> gs.Constant:
        key = values.dtype.name, values.tobytes(), values.shape
        if key not in self._shared:
            self._shared[key] = gs.Constant(self._names.number("c"), values)
        return self._shared[key]

    def _node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: npt.DTypeLike = np.uint8,
        **attrs: int | str,
    ) -> gs.Variable:
        made = gs.Variable(self._names.number("d"), np.dtype(dtype))
        self._nodes.append(gs.Node(op, "", attrs, list(inputs), [made]))
        return made


def decoded(graph: gs.Graph) -> Iterator[Decoded]:
    """The constants that `graph` decodes, in the order of its nodes."""
    for node in graph.nodes:
        table = node.inputs[0] if node.op == "Gather" and not node.attrs.get("axis", 0) else None
        if not isinstance(table, gs.Constant) or not _is_table(table):
            continue
        stored = _sources(node.inputs[1])
        if stored:
            bits = max(1, (table.values.size - 1).bit_length())
            yield Decoded(node=node, bits=bits, stored=(table, *stored))


def unpack(graph: gs.Graph) -> int:
    """Store the constants that a graph decodes as they are, in place; return how many."""
    found = [each.node for each in decoded(graph)]
    if not found:
        return 0
    chain = _chain(found)
    outputs = [node.outputs[0] for node in found]
    values = compiled(gs.Graph(nodes=chain, outputs=outputs), graph.opset).run({})
    for node in found:
        (tensor,) = node.outputs
        node.outputs.clear()
        tensor.to_constant(values[tensor.name])
    kept = {id(tensor) for tensor in graph.outputs}
    gone = list[gs.Node]()
    for node in reversed(chain):  # a node goes when those that read it are gone
        if not any(t.outputs or id(t) in kept for t in node.outputs):
            node.inputs.clear()
            gone.append(node)
    remove(graph, gone)
    return len(found)


def _chain(gathers: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes that make the indices, and the Gathers, each behind those it reads."""
    found: dict[int, gs.Node] = {}
    for gather in gathers:
        found |= {id(node): node for node in _makers(gather)}
    return list(found.values())


def _makers(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        for maker in tensor.inputs:
            yield from _makers(maker)
    yield node


def _sources(tensor: gs.Tensor) -> list[gs.Constant] | None:
    """The constants that an index is decoded from; None if it is made otherwise."""
    maker = producer(tensor)
    if maker is None or maker.op not in DECODING:
        return None
    found = list[gs.Constant]()
    for given in maker.inputs:
        inner = [given] if isinstance(given, gs.Constant) else _sources(given)
        if inner is None:
            return None
        found += inner
    return found


def _is_table(table: gs.Constant) -> bool:
    values = table.values
    small = values.ndim == 1 and 0 < values.size <= LARGEST_TABLE
    return small and values.dtype in (np.int8, np.uint8)
