"""What TensorRT takes, but likely not faster than in float: small products, unfused residual sums.

Sources: the sizes below which NVIDIA's own quantizer leaves products in float (Model Optimizer,
`modelopt/onnx/quantization/graph_utils.py`); "Working with Quantized Types" for residual sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_intq.graph import producer
from onnx_intq.placement import FUSED, WEIGHTED
from onnx_intq.qdq import (
    DEQUANTIZE,
    QUANTIZE,
    dequantizer,
    holds_weight,
    integer_type,
    nodes,
    pair,
)
from onnx_intq.qdq_rules import Finding, Rule, finding

SMALLEST = 16
"""Channels, or values summed, that a tensor core's tile has."""
ALIGNED = 8
"""Channels that are read at once."""
WIDE = 3
"""Taps from which a grouped convolution pays."""
KEEP = "leave it float (--override NODES=float), or measure both"


def small_convolution(graph: gs.Graph) -> Iterator[Finding]:
    """A dense convolution has 16 channels on one side, a multiple of 8 on one, and a square kernel.

    With 16 on both sides anything goes; the first layer may have fewer on both.
    """
    for node, weight in _quantized(graph, "Conv"):
        outputs, inputs, *kernel = weight.shape
        if node.attrs.get("group", 1) != 1 or min(outputs, inputs) >= SMALLEST:
            continue
        aligned = outputs % ALIGNED == 0 or inputs % ALIGNED == 0
        wide = max(outputs, inputs) >= SMALLEST or _reads_input(graph, node)
        if not (aligned and wide and len(set(kernel)) <= 1):
            size = "x".join(map(str, kernel))
            found = f"an int8 convolution of {inputs} to {outputs} channels, kernel {size}"
            yield finding(node, found, f"{SMALLEST} channels or more on both sides", KEEP)


def small_grouped_convolution(graph: gs.Graph) -> Iterator[Finding]:
    """A grouped convolution has a multiple of 8 channels, and 3 or more taps on every axis.

    With 16 channels in every group anything goes.
    """
    for node, weight in _quantized(graph, "Conv"):
        outputs, inputs, *kernel = weight.shape
        if node.attrs.get("group", 1) == 1 or min(outputs, inputs) >= SMALLEST:
            continue
        if outputs % ALIGNED or min(kernel) < WIDE:
            size = "x".join(map(str, kernel))
            found = f"an int8 grouped convolution of {outputs} channels, kernel {size}"
            expected = f"a multiple of {ALIGNED} channels, and a kernel of {WIDE} or more"
            yield finding(node, found, expected, KEEP)


def small_product(graph: gs.Graph) -> Iterator[Finding]:
    """A matrix product sums 16 values or more for 16 results or more."""
    for node, weight in _quantized(graph, "MatMul", "Gemm"):
        rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (*weight.shape, 1)
        if min(rows, columns) < SMALLEST:
            found = f"an int8 {node.op} with a weight of {rows} x {columns}"
            yield finding(node, found, f"{SMALLEST} or more on both axes", KEEP)


def int4_weight(graph: gs.Graph) -> Iterator[Finding]:
    """Weights have int8: GPUs of compute capability 7.5, such as T4, do not take int4."""
    for node in nodes(graph, DEQUANTIZE):
        if integer_type(node) == "int4" and holds_weight(node):
            found = "a weight stored as int4, which a T4 does not take"
            yield finding(node, found, "int8", "keep it for GPUs of 8.0 and newer")


def float_residual(graph: gs.Graph) -> Iterator[Finding]:
    """One operand of a sum that is quantized is quantized too: else its convolution gives float."""
    for node in nodes(graph, "Add"):
        makers = [producer(t) for t in node.inputs]
        convolution = next((m for m in makers if m is not None and _runs_on_int8(m)), None)
        if convolution is None or len(_computed(node)) < 2 or not _is_quantized_behind(node):
            continue
        if all(dequantizer(t, moved=True) is None for t in node.inputs):
            found = f"a float residual sum behind the quantized {convolution.op}"
            expected = "its other operand quantized, to fuse into an int8 result"
            yield finding(node, found, expected, "quantize the other operand")


def _quantized(graph: gs.Graph, *ops: str) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """Nodes with both factors quantized, and their stored weight, if its shape is known."""
    for node in nodes(graph, *ops):
        makers = [dequantizer(t, moved=True) for t in node.inputs[:2]]
        weights = [m.inputs[0] for m in makers if m is not None and holds_weight(m)]
        if len(weights) == 1 and all(m is not None for m in makers) and weights[0].shape:
            yield node, weights[0]


def _reads_input(graph: gs.Graph, node: gs.Node) -> bool:
    quantize = pair(node.inputs[0])
    return quantize is not None and any(quantize.inputs[0] is t for t in graph.inputs)


def _runs_on_int8(node: gs.Node) -> bool:
    return node.op in WEIGHTED and all(dequantizer(t, moved=True) for t in node.inputs[:2])


def _computed(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.inputs if not isinstance(t, gs.Constant)]


def _is_quantized_behind(node: gs.Node) -> bool:
    """Whether a Q node reads the node's result, behind an activation that fuses."""
    readers = list(node.outputs[0].outputs)
    fused = [r for reader in readers if reader.op in FUSED for r in reader.outputs[0].outputs]
    return any(reader.op == QUANTIZE for reader in (*readers, *fused))


RULES: tuple[Rule, ...] = (
    Rule("small-convolution", small_convolution),
    Rule("small-grouped-convolution", small_grouped_convolution),
    Rule("small-product", small_product),
    Rule("int4-weight", int4_weight),
    Rule("float-residual", float_residual),
)
