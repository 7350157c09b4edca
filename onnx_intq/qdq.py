"""Reads the QuantizeLinear and DequantizeLinear nodes of a graph: types, scales, what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import constant, producer, subgraphs
from onnx_intq.placement import SAME_GRID

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QDQ = (QUANTIZE, DEQUANTIZE)


def nodes(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """The nodes of `graph` and its bodies with one of the operators `ops`, all if none is given."""
    for sub in subgraphs(graph):
        yield from (node for node in sub.nodes if not ops or node.op in ops)


def type_name(tensor: gs.Tensor) -> str:
    """A tensor's type in lower case, such as "int8" or "float8e4m3fn"; "" where not known."""
    dtype = tensor.dtype
    if dtype is None:
        return ""
    if isinstance(dtype, int):  # graphsurgeon keeps ONNX's number where NumPy has no such type
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return str(np.dtype(dtype).name)


def has_input(node: gs.Node, index: int) -> bool:
    """Whether an optional input is given."""
    return index < len(node.inputs) and not node.inputs[index].is_empty()


def integer_type(node: gs.Node) -> str:
    """The type on the quantized side of a Q or DQ node; "" where not known."""
    if has_input(node, 2):
        return type_name(node.inputs[2])
    if node.op == QUANTIZE:
        chosen = node.attrs.get("output_dtype", 0)
        return str(onnx.TensorProto.DataType.Name(chosen)).lower() if chosen else "uint8"
    maker = quantizer(node)
    return type_name(node.inputs[0]) or (integer_type(maker) if maker is not None else "")


def scale(node: gs.Node) -> npt.NDArray[Any] | None:
    """The scale of a Q or DQ node; None if computed at run time."""
    return constant(node, 1)


def zero_point(node: gs.Node) -> npt.NDArray[Any] | None:
    """The zero point; None if it is absent, computed at run time, or of a type NumPy lacks."""
    known = has_input(node, 2) and not isinstance(node.inputs[2].dtype, int)
    return constant(node, 2) if known else None


def per_channel(node: gs.Node) -> bool:
    """Whether the node has one scale per channel, not one for the tensor nor one per block."""
    found = scale(node)
    return found is not None and found.ndim == 1 and found.size > 1


def dequantizer(tensor: gs.Tensor, *, moved: bool = False) -> gs.Node | None:
    """The DQ node that makes `tensor`; with `moved`, also behind nodes that only move values."""
    maker = producer(tensor)
    while moved and maker is not None and maker.op in SAME_GRID:
        maker = producer(maker.inputs[0])
    return maker if maker is not None and maker.op == DEQUANTIZE else None


def quantizer(dequantize: gs.Node) -> gs.Node | None:
    """The Q node that a DQ node reads; None for stored integers and those computed otherwise."""
    maker = producer(dequantize.inputs[0])
    return maker if maker is not None and maker.op == QUANTIZE else None


def pair(tensor: gs.Tensor) -> gs.Node | None:
    """The Q node of the Q/DQ pair that makes `tensor`."""
    maker = dequantizer(tensor)
    return quantizer(maker) if maker is not None else None


def holds_weight(node: gs.Node) -> bool:
    """Whether a Q or DQ node works on a constant: stored integers, or floats quantized in place."""
    maker = quantizer(node) if node.op == DEQUANTIZE else None
    return isinstance((maker or node).inputs[0], gs.Constant)


def repeats(node: gs.Node) -> bool:
    """Whether `node` is a DQ with the very scale and zero point of its Q: one finding does."""
    maker = quantizer(node) if node.op == DEQUANTIZE else None
    if maker is None or len(maker.inputs) != len(node.inputs):
        return False
    return all(a is b for a, b in zip(maker.inputs[1:], node.inputs[1:], strict=True))
