"""What onnxruntime cannot load: versions and types. Measured on onnxruntime 1.31, CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs

from onnx_intq.graph import MAX_IR
from onnx_intq.qdq import QDQ, integer_type, nodes, repeats
from onnx_intq.qdq_rules import Finding, Rule, finding

MAX_OPSET = 26
"""Newest opset of the default domain that onnxruntime 1.31 reads."""
TYPE_OPSETS: Mapping[str, int] = {
    **dict.fromkeys(("int8", "uint8", "int32"), 10),
    **dict.fromkeys(("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"), 19),
    **dict.fromkeys(("int4", "uint4", "int16", "uint16"), 21),
    **dict.fromkeys(("int2", "uint2"), 25),
}
"""The types of Q and DQ nodes that onnxruntime takes, and the opset each needs."""


def ir_version(graph: gs.Graph) -> Iterator[Finding]:
    """The file's IR version is one that onnxruntime reads."""
    if (graph.ir_version or 0) > MAX_IR:
        yield "model", f"IR version {graph.ir_version}; expected at most {MAX_IR}; save it anew"


def opset(graph: gs.Graph) -> Iterator[Finding]:
    """The opset is one that onnxruntime reads."""
    if graph.opset > MAX_OPSET:
        yield "model", f"opset {graph.opset}; expected at most {MAX_OPSET}; export it with that"


def type_opset(graph: gs.Graph) -> Iterator[Finding]:
    """The opset has Q and DQ nodes of the type: 16-bit and 4-bit ones need opset 21."""
    for node in nodes(graph, *QDQ):
        name = integer_type(node)
        if not name or node.domain or repeats(node):
            continue
        found = f"{node.op} of {name} in opset {graph.opset}"
        if name not in TYPE_OPSETS:
            yield finding(node, found, f"one of: {', '.join(TYPE_OPSETS)}", "use 8 bits")
        elif graph.opset < TYPE_OPSETS[name]:
            expected = f"opset {TYPE_OPSETS[name]} or newer"
            yield finding(node, found, expected, "export the float model with that")


def quantized(graph: gs.Graph) -> Iterator[Finding]:
    """Something runs on integers."""
    if not any(nodes(graph, *QDQ)):
        yield "model", "no QuantizeLinear or DequantizeLinear; expected a Q/DQ model; quantize it"


RULES: tuple[Rule, ...] = (
    Rule("quantized", quantized),
    Rule("ir-version", ir_version),
    Rule("opset", opset),
    Rule("type-opset", type_opset),
)
