"""Where Q/DQ pairs keep TensorRT from running on integers, from fusing, or from being precise.

Source: NVIDIA's "Working with Quantized Types", "Q/DQ Layer-Placement Recommendations".
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_intq.graph import producer
from onnx_intq.placement import FUSED, SAME_GRID, SENSITIVE, WEIGHTED
from onnx_intq.qdq import QUANTIZE, dequantizer, nodes, pair, scale
from onnx_intq.qdq_rules import Finding, Rule, finding, half_quantized, one_sided

MOVING = SAME_GRID | {"AveragePool", "GlobalAveragePool"}
"""Operators that run on the grid of their input."""


def quantized_on_one_side(graph: gs.Graph) -> Iterator[Finding]:
    """Convolutions and matrix products have both inputs quantized, or none."""
    for node, tensor in half_quantized(graph):
        yield one_sided(node, tensor)


def split_fusion(graph: gs.Graph) -> Iterator[Finding]:
    """No Q/DQ pair stands between a convolution and its BatchNormalization or activation."""
    for node in nodes(graph, "BatchNormalization", *FUSED):
        quantize = pair(node.inputs[0])
        maker = producer(quantize.inputs[0]) if quantize is not None else None
        if maker is not None and maker.op in WEIGHTED | {"BatchNormalization"}:
            found = f"a Q/DQ pair between {maker.op} {maker.name!r} and this {node.op}"
            yield finding(node, found, "them side by side, to fuse", "quantize behind both")


def unfolded_bn(graph: gs.Graph) -> Iterator[Finding]:
    """No BatchNormalization stands behind a quantized convolution."""
    for node in nodes(graph, "BatchNormalization"):
        maker = producer(node.inputs[0])
        if maker is not None and maker.op in WEIGHTED and dequantizer(maker.inputs[0]) is not None:
            found = f"a BatchNormalization behind the quantized {maker.op} {maker.name!r}"
            yield finding(node, found, "it folded", "run the pass fold_bn before quantizing")


def concat_scales(graph: gs.Graph) -> Iterator[Finding]:
    """The inputs of Concat share one scale, or all but one must be quantized anew."""
    for node in nodes(graph, "Concat"):
        makers = [dequantizer(t) for t in node.inputs]
        scales = [scale(m) for m in makers if m is not None]
        values = sorted({float(s.flat[0]) for s in scales if s is not None and s.size == 1})
        if len(values) > 1:
            found = f"inputs with the scales {', '.join(f'{v:.6g}' for v in values)}"
            yield finding(node, found, "one scale for all", "give them all one range")


def quantized_on_both_sides(graph: gs.Graph) -> Iterator[Finding]:
    """Pooling and reshaping keep their input's grid: a second Q/DQ pair only adds an error."""
    for node in nodes(graph, *MOVING):
        if pair(node.inputs[0]) is None:
            continue
        if any(reader.op == QUANTIZE for reader in node.outputs[0].outputs):
            found = f"{node.op} with Q/DQ pairs before and behind it"
            yield finding(node, found, "one pair", "remove the other")


def quantized_residual(graph: gs.Graph) -> Iterator[Finding]:
    """An Add has one operand float, straight from a convolution, with which it then fuses."""
    for node in nodes(graph, "Add"):
        pairs = [found for t in node.inputs if (found := pair(t)) is not None]
        makers = [producer(quantize.inputs[0]) for quantize in pairs]
        fusible = [m for m in makers if m is not None and m.op in WEIGHTED]
        if len(pairs) == 2 and fusible:
            found = f"both operands quantized, so no fusion with {fusible[0].op}"
            expected = f"the result of {fusible[0].name!r} float"
            yield finding(node, found, expected, "remove the Q/DQ pair between them")


def quantized_front_end(graph: gs.Graph) -> Iterator[Finding]:
    """Operators that amplify rounding errors near zero, as Log does, read floats."""
    for node in nodes(graph, *SENSITIVE):
        if node.op == "Div" and isinstance(node.inputs[1], gs.Constant):
            continue
        if any(pair(t) is not None for t in node.inputs):
            found = f"{node.op} of a quantized tensor, whose rounding error it amplifies"
            yield finding(node, found, "a float input", "remove the Q/DQ pair")


def quantized_output(graph: gs.Graph) -> Iterator[Finding]:
    """The graph's outputs are not rounded once more."""
    for tensor in graph.outputs:
        if pair(tensor) is not None:
            found = f"output {tensor.name!r} quantized and dequantized"
            yield finding(tensor.inputs[0], found, "a float output", "remove the Q/DQ pair")


RULES: tuple[Rule, ...] = (
    Rule("one-sided", quantized_on_one_side),
    Rule("split-fusion", split_fusion),
    Rule("batch-norm", unfolded_bn),
    Rule("concat-scales", concat_scales),
    Rule("both-sides", quantized_on_both_sides),
    Rule("residual", quantized_residual),
    Rule("front-end", quantized_front_end),
    Rule("output", quantized_output),
)
