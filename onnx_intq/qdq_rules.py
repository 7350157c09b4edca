"""Rules for Q/DQ models that every target has: scales, axes, one-sided products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.placement import WEIGHTED
from onnx_intq.qdq import (
    QDQ,
    dequantizer,
    holds_weight,
    integer_type,
    nodes,
    per_channel,
    quantizer,
    repeats,
    scale,
)

Finding = tuple[str, str]
"""(node name, message)."""
PER_CHANNEL_OPSET = 13
"""The opset that brought QuantizeLinear's axis."""
PARSER, BUILDER = "parser", "builder"
"""The parts of TensorRT that refuse models."""


class Rule(NamedTuple):
    """What a model must keep.

    Attributes:
        name: Its name.
        find: Yields a finding for every node that breaks it.
        refused_by: The part of TensorRT-RTX that refuses what breaks it, too; "" where only the
            documents say so, or where such a model is built, but slower or wrong.
    """

    name: str
    find: Callable[[gs.Graph], Iterable[Finding]]
    refused_by: str = ""


def finding(node: gs.Node, found: str, expected: str, advice: str) -> Finding:
    """A finding about `node`: what was found, what was expected, what to do."""
    return node.name or node.op, f"{found}; expected {expected}; {advice}"


def positive_scale(graph: gs.Graph) -> Iterator[Finding]:
    """Scales are positive and finite."""
    for node in nodes(graph, *QDQ):
        found = scale(node)
        if found is None or repeats(node):
            continue
        wrong = found[~(np.isfinite(found) & (found > 0))]
        if wrong.size:
            yield finding(node, f"scale {wrong[0]:g}", "positive, finite ones", "calibrate again")


def per_channel_activation(graph: gs.Graph) -> Iterator[Finding]:
    """Activations have one scale per tensor: no integer kernel takes more."""
    for node in nodes(graph, *QDQ):
        if per_channel(node) and not holds_weight(node) and not repeats(node):
            found = "an activation with one scale per channel"
            yield finding(node, found, "one for the tensor", "quantize activations per tensor")


def weight_axis(graph: gs.Graph) -> Iterator[Finding]:
    """Weights have one scale per output channel.

    TensorRT computes other axes in float; onnxruntime 1.31 fuses them all the same and takes the
    scales for those of the output channels: the result is wrong.
    """
    for node, index, dequantize in _weights(graph):
        if not per_channel(dequantize):
            continue
        rank = _rank(dequantize)
        axis, channels = dequantize.attrs.get("axis", 1), _channel_axis(node, index, rank)
        if (axis + rank if axis < 0 else axis) != channels:
            yield finding(
                dequantize,
                f"scales along axis {axis} of the weight of {node.op} {node.name!r}",
                "one scale for the tensor" if channels is None else f"axis {channels}",
                "quantize it along its output channels",
            )


def per_channel_opset(graph: gs.Graph) -> Iterator[Finding]:
    """One scale per channel needs opset 13."""
    if graph.opset >= PER_CHANNEL_OPSET:
        return
    for node in nodes(graph, *QDQ):
        if per_channel(node) and not repeats(node):
            found = f"one scale per channel in opset {graph.opset}"
            yield finding(node, found, f"opset {PER_CHANNEL_OPSET} or newer", "export it with that")


def half_quantized(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """Convolutions and matrix products of which one side is quantized, with the float side.

    4-bit weights with float activations are passed over: a method of its own.
    """
    for node in nodes(graph, *WEIGHTED):
        makers = [dequantizer(t, moved=True) for t in node.inputs[:2]]
        floats = [t for t, m in zip(node.inputs, makers, strict=False) if m is None]
        if len(floats) != 1:
            continue
        (quantized,) = (m for m in makers if m is not None)
        if not (holds_weight(quantized) and integer_type(quantized).endswith("int4")):
            yield node, floats[0]


def one_sided(node: gs.Node, tensor: gs.Tensor) -> Finding:
    """What to say of a node that `half_quantized` yields."""
    kind = "weight" if isinstance(tensor, gs.Constant) else "activation"
    found = f"{node.op} with one input quantized, its {kind} {tensor.name!r} float"
    return finding(node, found, "both quantized or none", "quantize both")


def _weights(graph: gs.Graph) -> Iterator[tuple[gs.Node, int, gs.Node]]:
    """Each quantized weight's reader, the reader's input, and the DQ node."""
    for node in nodes(graph, *WEIGHTED):
        for index, tensor in enumerate(node.inputs[:2]):
            maker = dequantizer(tensor)
            if maker is not None and holds_weight(maker):
                yield node, index, maker


def _rank(dequantize: gs.Node) -> int:
    return len(((quantizer(dequantize) or dequantize).inputs[0]).shape)


def _channel_axis(node: gs.Node, index: int, rank: int) -> int | None:
    """The output-channel axis of the weight that `node` reads as input `index`; None: it has none.

    A batch of matrices has none: onnxruntime 1.31 fuses it and then fails to run it.
    """
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if index == 0 or rank != 2:
        return None
    return 0 if node.attrs.get("transB", 0) else 1


RULES: tuple[Rule, ...] = (
    Rule("scale", positive_scale, PARSER),
    Rule("per-channel-activation", per_channel_activation),
    Rule("weight-axis", weight_axis),
    Rule("per-channel-opset", per_channel_opset),
)
"""For every target; `half_quantized` has exceptions of each target's own."""
