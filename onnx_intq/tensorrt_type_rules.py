"""What TensorRT's parser and builder refuse: types, zero points, scales, operators.

Sources: NVIDIA's "Working with Quantized Types", "Explicit Quantization"; for operators
`OnnxParser.supports_operator` of TensorRT-RTX 1.7. TensorRT-RTX is laxer than TensorRT: it takes a
uint8 zero point of 0 for int8, for example.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnx_intq.graph import subgraphs
from onnx_intq.placement import WEIGHTED
from onnx_intq.qdq import (
    DEQUANTIZE,
    QDQ,
    QUANTIZE,
    dequantizer,
    has_input,
    holds_weight,
    integer_type,
    nodes,
    repeats,
    type_name,
    zero_point,
)
from onnx_intq.qdq_rules import BUILDER, PARSER, Finding, Rule, finding

REQUANTIZE = "quantize the float model again with --target tensorrt"
RUN_TIME = "run the pass fold_constants, or quantize statically"
CONVOLUTIONS = ("Conv", "ConvTranspose")
TYPES = {"int2", "int16", "uint2", "uint4", "uint16", "uint32", "uint64"}
TYPES |= {"float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"}
"""Types no TensorRT tensor can have."""
INTEGER_REFUSED = WEIGHTED | {"Relu"}
"""Operators that take no integers."""
OPERATORS = {
    "AffineGrid",
    "Bernoulli",
    "BitCast",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "CenterCropPad",
    "Col2Im",
    "Compress",
    "ConcatFromSequence",
    "ConvInteger",
    "CumProd",
    "DFT",
    "DeformConv",
    "Det",
    "DynamicQuantizeLinear",
    "ImageDecoder",
    "MatMulInteger",
    "MaxRoiPool",
    "MaxUnpool",
    "MelWeightMatrix",
    "Multinomial",
    "NegativeLogLikelihoodLoss",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "QLinearConv",
    "QLinearMatMul",
    "RegexFullMatch",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SequenceMap",
    "SoftmaxCrossEntropyLoss",
    "SplitToSequence",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "SwiGLU",
    "TfIdfVectorizer",
    "Unique",
}
"""Standard operators the parser does not know."""


def nonzero_zero_point(graph: gs.Graph) -> Iterator[Finding]:
    """Zero points are 0."""
    for node in nodes(graph, *QDQ):
        values = zero_point(node)
        if values is not None and values.any() and not repeats(node):
            found = f"zero point {values[values != 0][0]}"
            yield finding(node, found, "0 (symmetric quantization)", REQUANTIZE)


def run_time_zero_point(graph: gs.Graph) -> Iterator[Finding]:
    """Zero points are constants."""
    for node in nodes(graph, *QDQ):
        if has_input(node, 2) and not isinstance(node.inputs[2], gs.Constant) and not repeats(node):
            found = f"zero point {node.inputs[2].name!r} computed at run time"
            yield finding(node, found, "the constant 0", RUN_TIME)


def unsigned(graph: gs.Graph) -> Iterator[Finding]:
    """Quantized tensors are signed: a uint8 zero point of 0 is silently read as int8."""
    for node in nodes(graph, *QDQ):
        if integer_type(node) == "uint8" and has_input(node, 2) and not repeats(node):
            yield finding(node, "quantized to uint8", "int8", REQUANTIZE)


def missing_zero_point(graph: gs.Graph) -> Iterator[Finding]:
    """Every Q and DQ node names its type by a zero point: without, ONNX quantizes to uint8."""
    for node in nodes(graph, *QDQ):
        if not has_input(node, 2) and integer_type(node) != "int32" and not repeats(node):
            unclear = integer_type(node) == "uint8"
            reading = ", by which ONNX means uint8 and TensorRT int8" if unclear else ""
            found = f"no zero point{reading}"
            yield finding(node, found, "an explicit int8 zero point of 0", REQUANTIZE)


def int32_bias(graph: gs.Graph) -> Iterator[Finding]:
    """Biases are float: int32 through DequantizeLinear, onnxruntime's way, is refused."""
    for node in nodes(graph, DEQUANTIZE):
        if integer_type(node) == "int32":
            yield finding(node, "an int32 bias dequantized", "a float bias", REQUANTIZE)


def run_time_scale(graph: gs.Graph) -> Iterator[Finding]:
    """Scales are constants; TensorRT-RTX 1.7 crashes on a scale that is an input of the graph."""
    for node in nodes(graph, *QDQ):
        if not isinstance(node.inputs[1], gs.Constant) and not repeats(node):
            found = f"scale {node.inputs[1].name!r} computed at run time"
            yield finding(node, found, "a constant", RUN_TIME)


def run_time_weight(graph: gs.Graph) -> Iterator[Finding]:
    """The quantized weight of a convolution is a constant; TensorRT-RTX takes any."""
    for node in nodes(graph, *CONVOLUTIONS):
        maker = dequantizer(node.inputs[1], moved=True)
        if maker is not None and not holds_weight(maker):
            found = f"{node.op} with its quantized weight computed at run time"
            yield finding(node, found, "a constant weight", "run the pass fold_constants")


def blocks(graph: gs.Graph) -> Iterator[Finding]:
    """Blocks of a tensor have scales of their own in 4 bits alone."""
    for node in nodes(graph, *QDQ):
        if node.attrs.get("block_size", 0) and not integer_type(node).endswith("int4"):
            found = f"{integer_type(node)} with one scale per {node.attrs['block_size']} values"
            yield finding(node, found, "one per tensor or channel", REQUANTIZE)


def integer_constant(graph: gs.Graph) -> Iterator[Finding]:
    """Constants of type int8 or int4 stand straight before a DQ node."""
    for node in nodes(graph):
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or type_name(tensor) not in {"int8", "int4"}:
                continue
            if (node.op == DEQUANTIZE and index == 0) or (node.op in QDQ and index == 2):
                continue
            found = f"{node.op} of the {type_name(tensor)} constant {tensor.name!r}"
            yield finding(node, found, "only DequantizeLinear to read it", "store it in int32")


def refused_type(graph: gs.Graph) -> Iterator[Finding]:
    """TensorRT has int8, int32, int64, and int4 for weights; no other integers, one float8."""
    for node in nodes(graph):
        found = {type_name(t) for t in (*node.inputs, *node.outputs)}
        if node.op in QDQ:
            found.add(integer_type(node))
        for name in sorted(found & TYPES):
            yield finding(node, f"tensors of type {name}", "int8, int32 or int64", "cast them")


def uint8_tensor(graph: gs.Graph) -> Iterator[Finding]:
    """The type uint8 is for the inputs and outputs of a graph, and quantized tensors have int8."""
    outputs = {id(tensor) for sub in subgraphs(graph) for tensor in sub.outputs}
    for node in nodes(graph):
        inside = [t for t in node.outputs if type_name(t) == "uint8" and id(t) not in outputs]
        if node.op not in QDQ and inside:
            found = f"{node.op} to the uint8 tensor {inside[0].name!r}"
            yield finding(node, found, "uint8 as input or output alone", "cast it to int32")


def int4_activation(graph: gs.Graph) -> Iterator[Finding]:
    """The type int4 is for weights alone."""
    for node in nodes(graph, QUANTIZE):
        if integer_type(node) == "int4" and not holds_weight(node):
            yield finding(node, "an activation quantized to int4", "int8", REQUANTIZE)


def refused_operator(graph: gs.Graph) -> Iterator[Finding]:
    """The parser knows the operator; functions that the model defines itself are inlined."""
    functions = {function.name for function in graph.functions}
    for node in nodes(graph):
        foreign = node.domain not in {None, "", "ai.onnx"}
        if node.op not in functions and (foreign or node.op in OPERATORS):
            found = f"{node.op} of domain {node.domain}" if foreign else node.op
            advice = "rewrite it with others, or start again from the float model"
            yield finding(node, found, "operators that TensorRT's parser knows", advice)


def integer_operator(graph: gs.Graph) -> Iterator[Finding]:
    """Relu and matrix products take floats; Add, Mul, Clip and so on take integers, too."""
    for node in nodes(graph, *INTEGER_REFUSED):
        found = type_name(node.inputs[0])
        if found.startswith(("int", "uint")):
            yield finding(node, f"{node.op} of {found}", "float inputs", "dequantize them first")


RULES: tuple[Rule, ...] = (
    Rule("operator", refused_operator, PARSER),
    Rule("type", refused_type, PARSER),
    Rule("uint8", uint8_tensor, PARSER),
    Rule("integer-operator", integer_operator, PARSER),
    Rule("zero-point", nonzero_zero_point, PARSER),
    Rule("missing-zero-point", missing_zero_point),
    Rule("run-time-zero-point", run_time_zero_point, BUILDER),
    Rule("unsigned", unsigned),
    Rule("int32-bias", int32_bias, PARSER),
    Rule("int4-activation", int4_activation),
    Rule("run-time-scale", run_time_scale, BUILDER),
    Rule("run-time-weight", run_time_weight),
    Rule("block", blocks, PARSER),
    Rule("integer-constant", integer_constant, BUILDER),
)
