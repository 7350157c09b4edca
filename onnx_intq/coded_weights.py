"""Weights that are on grids or codebooks while all else is float, taken off and put on again.

Such a model is what `compress`, `train` and weight-only quantizers write: int8 constants behind
DequantizeLinear, float operators. To the passes that quantize activations it is a float model;
what they store of its weights are the integers it came with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.codebook import CodedWeight
from onnx_intq.cost import BITS_KEY, recorded_bits
from onnx_intq.graph import constant, load, metadata, remove
from onnx_intq.packing import unpack
from onnx_intq.summary import INTEGER

Float32 = npt.NDArray[np.float32]
Coded = dict[tuple[str, int], CodedWeight]
"""(node, which of its inputs) -> the weight it reads."""
CLOSE = 1e-5
"""Part of a channel's largest weight by which float32 may move it when a factor is folded."""


def load_coded(path: str | Path) -> tuple[gs.Graph, Coded]:
    """Read a model, packed weights decoded, and made float where nothing else is integer.

    Returns:
        The graph, and which weights are on grids; none unless only weights are.

    Raises:
        IntqError: It is no ONNX file.
    """
    graph = load(path)
    unpack(graph)
    return graph, lift(graph)


def is_weight_only(graph: gs.Graph) -> bool:
    """Whether weights are integers and all else is float; packed weights must be decoded."""
    found = list(qdq.nodes(graph, *qdq.QDQ, *INTEGER, "QLinearConv", "QLinearMatMul"))
    return bool(found) and all(_is_weight(node) for node in found)


def lift(graph: gs.Graph) -> Coded:
    """Dequantize the weights of a weight-only model, in place; none of any other.

    Returns:
        The weights, by who reads them.
    """
    if not is_weight_only(graph):
        return {}
    widths, found = recorded_bits(graph), Coded()
    made = list(qdq.nodes(graph, qdq.DEQUANTIZE))
    for node in made:
        coded, (real,) = _coded(node, widths), node.outputs
        for reader in real.outputs:
            places = [i for i, t in enumerate(reader.inputs) if t is real]
            found |= {(str(reader.name), i): coded for i in places}
        node.outputs.clear()
        real.to_constant(coded.dequantized())
    remove(graph, made)
    metadata(graph).pop(BITS_KEY, None)
    return found


def scales_of(coded: CodedWeight, weight: Float32) -> Float32 | None:
    """The scales with which the integers of `coded` are `weight`; None where no such are.

    A BatchNorm or a factor that was folded into the weight is in its scales now.

    Args:
        coded: As it was read.
        weight: Float, as it is now.
    """
    if weight.shape != coded.stored.shape:
        return None
    if np.array_equal(coded.dequantized(), weight):
        return coded.scales
    axis = coded.axis
    shape = (1, -1) if axis is None else (weight.shape[axis], -1)
    integers, values = (
        np.moveaxis(each, axis or 0, 0).reshape(shape).astype(np.float64)
        for each in (coded.stored, weight)
    )
    squares = np.square(integers).sum(axis=1)
    ratios = (integers * values).sum(axis=1) / np.maximum(squares, 1)
    scales = np.where(squares > 0, ratios, np.reshape(coded.scales, -1)).astype(np.float32)
    lost = np.abs(integers * scales[:, None] - values).max(axis=1)
    if (scales <= 0).any() or (lost > CLOSE * np.abs(values).max(axis=1)).any():
        return None
    return scales.reshape(coded.scales.shape)


def _is_weight(node: gs.Node) -> bool:
    """Whether a node is a DequantizeLinear of an int8 constant, per channel or tensor, centred."""
    stored, scale = constant(node, 0), constant(node, 1)
    if node.op != qdq.DEQUANTIZE or stored is None or scale is None:
        return False
    zero = constant(node, 2)
    centred = not qdq.has_input(node, 2) or (zero is not None and not np.any(zero))
    return stored.dtype == np.int8 and centred and not node.attrs.get("block_size", 0)


def _coded(node: gs.Node, widths: Mapping[str, int]) -> CodedWeight:
    stored, scale = node.inputs[0].values, node.inputs[1].values
    axis = node.attrs.get("axis", 1) % max(stored.ndim, 1) if scale.size > 1 else None
    return CodedWeight(
        stored=stored,
        scales=scale.astype(np.float32).reshape(() if axis is None else -1),
        axis=axis,
        bits=widths.get(node.inputs[0].name, 8),
    )
