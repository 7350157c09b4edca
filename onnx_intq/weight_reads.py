"""How operators read constant weights: which inputs they are, and what they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_intq import qdq
from onnx_intq.graph import constant, producer, sole_consumer
from onnx_intq.lowering import fused
from onnx_intq.placement import WEIGHTED
from onnx_intq.weight_sites import channel_axis

LSTM = "LSTM"
LARGEST_BIAS = 1 << 30
"""Magnitude bound of an int32 bias: the accumulator needs the other half of the range."""
Read = tuple[gs.Node, int]
"""A node, and which of its inputs."""


def weight_indices(node: gs.Node, *, recurrent: bool) -> list[int]:
    """Which inputs are constant weights, multiplied with a dequantized activation.

    Args:
        node: An operator.
        recurrent: Whether those of an LSTM count whose input is float, too.
    """
    places = {"MatMul": (1, 0), LSTM: (1, 2)}.get(node.op, (1,))
    if node.op not in WEIGHTED | {LSTM}:
        return []
    found = [index for index in places if isinstance(node.inputs[index], gs.Constant)]
    if node.op == LSTM and recurrent:
        return found
    return [i for i in found if qdq.dequantizer(node.inputs[activation_index(node, i)]) is not None]


def activation_index(node: gs.Node, index: int) -> int:
    """Which input a weight is multiplied with: for an LSTM's recurrent one, its input stands."""
    return 0 if node.op == LSTM else 1 - index


def bias_floor(reads: Iterable[Read]) -> npt.NDArray[np.float32]:
    """Scales below which the bias of a reader would not fit: scalar or one per channel.

    That is, into int32 in steps of input x weight scale: runtimes quantize it so. Dead channels are
    concerned, as a rule: tiny weights, ordinary bias.
    """
    floor = np.zeros((), np.float32)
    for node, index in reads:
        floor = np.asarray(np.maximum(floor, _bias_floor(node, index)))
    return floor


def reads_unsigned(node: gs.Node, index: int) -> bool:
    """Whether the activation is unsigned, which is onnxruntime's dialect, not TensorRT's.

    TensorRT wants a zero point of 0 in writing. onnxruntime does not, and cannot load weights that
    share one where `session.x64quantprecision` is set on a processor without VNNI (1.31.1).
    """
    maker = producer(node.inputs[activation_index(node, index)])
    return maker is not None and qdq.integer_type(maker).startswith("u")


def activation_scales(model: gs.Graph, node: gs.Node, index: int) -> tuple[float, float]:
    """The scales of the other input and of the result, 0 where there is none; an LSTM has none."""
    if node.op == LSTM:
        return 0.0, 0.0
    quantizer = sole_consumer(model, fused(model, node)[-1].outputs[0])
    pair = producer(node.inputs[1 - index]), quantizer
    scales = [constant(n, 1) if n is not None and n.op in qdq.QDQ else None for n in pair]
    x, y = (0.0 if s is None or s.size != 1 else float(s.reshape(())) for s in scales)
    return x * abs(node.attrs.get("alpha", 1.0)), y


def _bias_floor(node: gs.Node, index: int) -> npt.NDArray[np.float32] | np.float32:
    bias = constant(node, 2)
    if bias is None or bias.ndim != 1 or index == 0:
        return np.float32(0)
    (dequantize,) = node.inputs[0].inputs
    step = np.float64(dequantize.inputs[1].values) * LARGEST_BIAS
    factor = node.attrs.get("beta", 1.0) / node.attrs.get("alpha", 1.0)
    floor: npt.NDArray[np.float32] = (np.abs(bias * np.float64(factor)) / step).astype(np.float32)
    return floor if channel_axis(node, index) is not None else floor.max()
