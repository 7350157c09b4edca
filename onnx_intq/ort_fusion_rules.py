"""Where onnxruntime does not run quantized operators on integers, though Q/DQ pairs ask for it.

Measured on onnxruntime 1.31, CPU, x86: what its QDQ fusions make of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from onnx_intq.coded_weights import is_weight_only
from onnx_intq.graph import constant, sole_consumer, subgraphs
from onnx_intq.placement import FUSED, WEIGHTED
from onnx_intq.qdq import (
    DEQUANTIZE,
    QUANTIZE,
    dequantizer,
    has_input,
    integer_type,
    nodes,
    quantizer,
    scale,
    zero_point,
)
from onnx_intq.qdq_rules import Finding, Rule, finding, half_quantized, one_sided

KERNELS = {"int8", "uint8"}
"""Types that its integer kernels take."""
REQUANTIZE = "quantize with --target ort: behind a Relu, the zero point is the lowest integer"
SIGNED = (
    "uint8 activations: on x86, onnxruntime takes an int8 pair only if one node reads it",
    "quantize with --target ort",
)
BIAS_TOLERANCE = 0.01
"""Relative difference of a bias's step from input scale x weight scale that still fuses."""


def quantized_on_one_side(graph: gs.Graph) -> Iterator[Finding]:
    """Both inputs are quantized, or none; some float weights onnxruntime rounds by itself.

    Models of which the weights alone are integers are made so to be small: see `weights_only`.
    """
    if is_weight_only(graph):
        return
    for node, tensor in half_quantized(graph):
        yield one_sided(node, tensor)


def weights_only(graph: gs.Graph) -> Iterator[Finding]:
    """Not only the weights are integers, for then the operators compute in float."""
    if is_weight_only(graph):
        count = sum(1 for _ in nodes(graph, DEQUANTIZE))
        message = (
            f"the weights alone, {count}, are integers: a small file, which computes in float; "
            "expected quantized activations, too, to compute in integers; quantize it"
        )
        yield "model", message


def unfused(graph: gs.Graph) -> Iterator[Finding]:
    """Operators with quantized inputs become QLinearConv, QGemm, QLinearMatMul."""
    for sub in subgraphs(graph):
        for node in sub.nodes:
            if node.op not in WEIGHTED or any(dequantizer(t) is None for t in node.inputs[:2]):
                continue
            if why := _obstacle(sub, node):
                yield finding(node, f"{node.op} of quantized inputs runs in float", *why)


def bias_scale(graph: gs.Graph) -> Iterator[Finding]:
    """A quantized bias is int32 with zero point 0, in steps of input scale x weight scale.

    Else the operator runs in float, or, where all scales are small, with a wrong bias.
    """
    for node in nodes(graph, "Conv", "Gemm"):
        makers = [dequantizer(t) for t in node.inputs[:3]]
        if len(makers) < 3 or any(maker is None for maker in makers):
            continue
        if found := _wrong_bias(node, *makers):
            expected = "int32, zero point 0, steps of input scale x weight scale"
            yield finding(node, f"a bias with {found}", expected, "quantize the float model again")


def _wrong_bias(node: gs.Node, x: gs.Node, w: gs.Node, bias: gs.Node) -> str:
    offset = zero_point(bias)
    if integer_type(bias) != "int32":
        return f"type {integer_type(bias)}"
    if offset is not None and offset.any():
        return "another zero point"
    scales = [scale(maker) for maker in (x, w, bias)]
    if any(found is None or found.ndim > 1 for found in scales):
        return ""
    x_scale, w_scale, step = (np.asarray(found, np.float64).ravel() for found in scales)
    if len({x_scale.size, w_scale.size, step.size} - {1}) > 1:
        return "other numbers of channels"
    expected = x_scale * w_scale * node.attrs.get("alpha", 1.0)
    return "" if np.allclose(step, expected, BIAS_TOLERANCE, 0) else "other steps"


def _obstacle(graph: gs.Graph, node: gs.Node) -> tuple[str, str] | None:
    """What onnxruntime lacks to run a node with quantized inputs on integers, and what to do."""
    if node.op == "ConvTranspose":
        return "float inputs: there is no integer ConvTranspose", "keep it float"
    makers = [dequantizer(t) for t in node.inputs]
    types = {integer_type(maker) for maker in makers[:2]}
    if other := types - KERNELS - {""}:
        return f"8 bits: there is no integer kernel for {max(other)}", "use 8 bits"
    activation, quantize = _behind(graph, node)
    if activation is not None and quantize is not None and _cuts(activation, quantize):
        return f"the {activation.op} behind it to leave all integers possible", REQUANTIZE
    if quantize is None and not _gives_float(node, activation):
        return "a QuantizeLinear, and nothing else, behind it", "quantize its output, too"
    signed = {_stays_signed(graph, n) for n in (makers[0], quantize) if n is not None}
    # QGemm takes int8, but gives the type it takes; the other kernels are for uint8 alone.
    return SIGNED if len(signed) > 1 or (True in signed and node.op != "Gemm") else None


def _gives_float(node: gs.Node, activation: gs.Node | None) -> bool:
    """Whether there is an integer kernel that gives the node's result in float."""
    if node.op == "Conv" or any(reader.op == QUANTIZE for reader in node.outputs[0].outputs):
        return False
    if activation is not None and len(activation.outputs[0].outputs) == 1:
        return False  # it is taken for a part of the node, and the Q node behind it is missed
    return not has_input(node, 2) or dequantizer(node.inputs[2]) is not None


def _behind(graph: gs.Graph, node: gs.Node) -> tuple[gs.Node | None, gs.Node | None]:
    """The activation and the Q node that read the node's result, if nothing else does."""
    reader = sole_consumer(graph, node.outputs[0])
    activation = reader if reader is not None and reader.op in FUSED else None
    if activation is not None:
        reader = sole_consumer(graph, activation.outputs[0])
    return activation, reader if reader is not None and reader.op == QUANTIZE else None


def _stays_signed(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether the Q/DQ pair of `node` is int8 and onnxruntime cannot make it uint8."""
    if integer_type(node) != "int8":
        return False
    quantize = node if node.op == QUANTIZE else quantizer(node)
    dequantize = sole_consumer(graph, quantize.outputs[0]) if quantize is not None else None
    if dequantize is None or dequantize.op != DEQUANTIZE:
        return True
    result = dequantize.outputs[0]
    return len(result.outputs) + sum(result is t for t in graph.outputs) > 1


def _cuts(activation: gs.Node, quantize: gs.Node) -> bool:
    """Whether an activation cuts off values that the Q node behind it could hold."""
    step, dtype = scale(quantize), integer_type(quantize)
    if step is None or dtype not in KERNELS or not step.flat[0] > 0:
        return False
    offset = zero_point(quantize)
    zero = 0.0 if offset is None else float(offset.flat[0])
    low, high = (np.rint(b / np.float64(step.flat[0])) + zero for b in _bounds(activation))
    grid = np.iinfo(dtype)
    return bool(low > grid.min or high < grid.max)


def _bounds(activation: gs.Node) -> tuple[float, float]:
    if activation.op == "Relu":
        return 0.0, np.inf
    low, high = (
        activation.attrs.get(name, constant(activation, index))
        for index, name in ((1, "min"), (2, "max"))
    )
    return -np.inf if low is None else float(low), np.inf if high is None else float(high)


RULES: tuple[Rule, ...] = (
    Rule("one-sided", quantized_on_one_side),
    Rule("unfused", unfused),
    Rule("bias", bias_scale),
)
"""What keeps operators from integers."""
WARNINGS: tuple[Rule, ...] = (Rule("weights-only", weights_only),)
