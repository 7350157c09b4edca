"""Every rule for TensorRT: a graph that breaks it alone, its message, and whether RTX agrees."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq.check import RULES, WARNINGS, check, warn
from onnx_intq.engine import build, parse
from onnx_intq.graph import graph_from_model
from onnx_intq.qdq_rules import BUILDER, PARSER, Rule
from onnx_intq.tensorrt_type_rules import OPERATORS
from onnx_intq.transform import IntqError

INPUT = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "v = DequantizeLinear(w, t, o)"
CONV = f"{INPUT} {WEIGHT} c = Conv(d, v, b)"
CLEAN = f"{INPUT} {WEIGHT} y = Conv(d, v, b)"
AGAIN = "p = QuantizeLinear(c, s, z) e = DequantizeLinear(p, s, z)"
STATISTICS = "b, b, b, b"
FOUR_BITS = onnx.helper.make_tensor("i4", onnx.TensorProto.INT4, [], [0])
REQUANTIZE = "quantize the float model again with --target tensorrt"
RUN_TIME = "run the pass fold_constants, or quantize statically"
KEEP = "leave it float (--override NODES=float), or measure both"
VALUES: dict[str, Any] = {
    "s": np.float32(0.1),
    "s2": np.float32(0.2),
    "vector": np.full(16, 0.1, np.float32),
    "t": np.float32(0.01),
    "z": np.int8(0),
    "zeros": np.zeros(16, np.int8),
    "o": np.int8(0),
    "w": np.ones((16, 16, 1), np.int8),
    "float_w": np.ones((16, 16, 1), np.float32),
    "square": np.ones((16, 16), np.int8),
    "b": np.ones(16, np.float32),
    "b32": np.ones(16, np.int32),
    "k": np.float32(2),
}


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A graph that breaks one rule.

    Attributes:
        body: ONNX text that may name `VALUES`.
        nodes: The nodes that break it.
        message: Found; expected; what to do: of the first node.
        inputs: Of the graph.
        opset: Of the graph.
        values: Instead of some of `VALUES`.
    """

    body: str
    nodes: tuple[str, ...]
    message: str
    inputs: str = "float[1, 16, n] x"
    opset: int = 21
    values: dict[str, Any] = field(default_factory=dict)


BROKEN: dict[str, Broken] = {
    "operator": Broken(
        body=f"{CONV} y = own.Swoosh(c)",
        nodes=("Swoosh_4",),
        message="Swoosh of domain own; expected operators that TensorRT's parser knows; "
        "rewrite it with others, or start again from the float model",
    ),
    "type": Broken(
        body=f"{CONV} i = Cast<to = 12>(c) y = Cast<to = 1>(i)",
        nodes=("Cast_4", "Cast_5"),
        message="tensors of type uint32; expected int8, int32 or int64; cast them",
    ),
    "uint8": Broken(
        body=f"{CONV} i = Cast<to = 2>(c) y = Cast<to = 1>(i)",
        nodes=("Cast_4",),
        message="Cast to the uint8 tensor 'i'; expected uint8 as input or output alone; "
        "cast it to int32",
    ),
    "integer-operator": Broken(
        body=f"{CONV} i = Cast<to = 6>(c) r = Relu(i) y = Cast<to = 1>(r)",
        nodes=("Relu_5",),
        message="Relu of int32; expected float inputs; dequantize them first",
    ),
    "zero-point": Broken(
        body=CLEAN,
        values={"z": np.int8(3)},
        nodes=("QuantizeLinear_0",),
        message=f"zero point 3; expected 0 (symmetric quantization); {REQUANTIZE}",
    ),
    "missing-zero-point": Broken(
        body=CLEAN.replace(", z)", ")"),
        nodes=("QuantizeLinear_0",),
        message="no zero point, by which ONNX means uint8 and TensorRT int8; "
        f"expected an explicit int8 zero point of 0; {REQUANTIZE}",
    ),
    "run-time-zero-point": Broken(
        body=CLEAN,
        inputs="float[1, 16, n] x, int8 z",
        nodes=("QuantizeLinear_0",),
        message=f"zero point 'z' computed at run time; expected the constant 0; {RUN_TIME}",
    ),
    "unsigned": Broken(
        body=CLEAN,
        values={"z": np.uint8(0)},
        nodes=("QuantizeLinear_0",),
        message=f"quantized to uint8; expected int8; {REQUANTIZE}",
    ),
    "int32-bias": Broken(
        body=f"{INPUT} {WEIGHT} a = DequantizeLinear(b32, t) y = Conv(d, v, a)",
        nodes=("DequantizeLinear_3",),
        message=f"an int32 bias dequantized; expected a float bias; {REQUANTIZE}",
    ),
    "int4-activation": Broken(
        body="q = QuantizeLinear(x, s, i4) d = DequantizeLinear(q, s, i4) y = Relu(d)",
        values={"i4": FOUR_BITS},
        nodes=("QuantizeLinear_0",),
        message=f"an activation quantized to int4; expected int8; {REQUANTIZE}",
    ),
    "run-time-scale": Broken(
        body=CLEAN,
        inputs="float[1, 16, n] x, float s",
        nodes=("QuantizeLinear_0",),
        message=f"scale 's' computed at run time; expected a constant; {RUN_TIME}",
    ),
    "run-time-weight": Broken(
        body=f"{INPUT} p = QuantizeLinear(f, t, o) v = DequantizeLinear(p, t, o) y = Conv(d, v)",
        inputs="float[1, 16, n] x, float[16, 16, 1] f",
        nodes=("Conv_4",),
        message="Conv with its quantized weight computed at run time; "
        "expected a constant weight; run the pass fold_constants",
    ),
    "block": Broken(
        body=f"{INPUT} v = DequantizeLinear<axis = 0, block_size = 8>(w, t, o) y = Conv(d, v)",
        values={
            "t": np.full((2, 16, 1), 0.1, np.float32),
            "o": np.zeros((2, 16, 1), np.int8),
        },
        nodes=("DequantizeLinear_2",),
        message="int8 with one scale per 8 values; expected one per tensor or channel; "
        f"{REQUANTIZE}",
    ),
    "integer-constant": Broken(
        body=f"{CONV} i = Cast<to = 1>(o) y = Mul(c, i)",
        nodes=("Cast_4",),
        message="Cast of the int8 constant 'o'; expected only DequantizeLinear to read it; "
        "store it in int32",
    ),
    "scale": Broken(
        body=CLEAN,
        values={"s": np.float32(0)},
        nodes=("QuantizeLinear_0",),
        message="scale 0; expected positive, finite ones; calibrate again",
    ),
    "per-channel-activation": Broken(
        body="q = QuantizeLinear(x, vector, zeros) d = DequantizeLinear(q, vector, zeros) "
        f"{WEIGHT} y = Conv(d, v, b)",
        nodes=("QuantizeLinear_0",),
        message="an activation with one scale per channel; expected one for the tensor; "
        "quantize activations per tensor",
    ),
    "weight-axis": Broken(
        body=f"{INPUT} v = DequantizeLinear<axis = 1>(w, vector, zeros) y = Conv(d, v, b)",
        nodes=("DequantizeLinear_2",),
        message="scales along axis 1 of the weight of Conv 'Conv_3'; expected axis 0; "
        "quantize it along its output channels",
    ),
    "per-channel-opset": Broken(
        body=f"{INPUT} v = DequantizeLinear(square, vector, zeros) y = MatMul(d, v)",
        inputs="float[1, n, 16] x",
        opset=12,
        nodes=("DequantizeLinear_2",),
        message="one scale per channel in opset 12; expected opset 13 or newer; "
        "export it with that",
    ),
    "one-sided": Broken(
        body=f"{INPUT} y = Conv(d, float_w)",
        nodes=("Conv_2",),
        message="Conv with one input quantized, its weight 'float_w' float; "
        "expected both quantized or none; quantize both",
    ),
    "split-fusion": Broken(
        body=f"{CONV} {AGAIN} y = Relu(e)",
        nodes=("Relu_6",),
        message="a Q/DQ pair between Conv 'Conv_3' and this Relu; "
        "expected them side by side, to fuse; quantize behind both",
    ),
    "batch-norm": Broken(
        body=f"{CONV} y = BatchNormalization(c, {STATISTICS})",
        nodes=("BatchNormalization_4",),
        message="a BatchNormalization behind the quantized Conv 'Conv_3'; expected it folded; "
        "run the pass fold_bn before quantizing",
    ),
    "concat-scales": Broken(
        body=f"{INPUT} r = Relu(x) p = QuantizeLinear(r, s2, z) e = DequantizeLinear(p, s2, z) "
        "y = Concat<axis = 1>(d, e)",
        nodes=("Concat_5",),
        message="inputs with the scales 0.1, 0.2; expected one scale for all; "
        "give them all one range",
    ),
    "both-sides": Broken(
        body=f"{INPUT} {WEIGHT} c = MaxPool<kernel_shape = [2]>(d) {AGAIN} y = Conv(e, v)",
        nodes=("MaxPool_3",),
        message="MaxPool with Q/DQ pairs before and behind it; expected one pair; remove the other",
    ),
    "residual": Broken(
        body=f"{CONV} {AGAIN} y = Add(e, d)",
        nodes=("Add_6",),
        message="both operands quantized, so no fusion with Conv; "
        "expected the result of 'Conv_3' float; remove the Q/DQ pair between them",
    ),
    "front-end": Broken(
        body=f"{INPUT} y = Log(d)",
        nodes=("Log_2",),
        message="Log of a quantized tensor, whose rounding error it amplifies; "
        "expected a float input; remove the Q/DQ pair",
    ),
    "output": Broken(
        body=f"{CONV} r = Relu(c) p = QuantizeLinear(r, s, z) y = DequantizeLinear(p, s, z)",
        nodes=("DequantizeLinear_6",),
        message="output 'y' quantized and dequantized; expected a float output; "
        "remove the Q/DQ pair",
    ),
    "small-convolution": Broken(
        body=CLEAN,
        values={"w": np.ones((12, 12, 1), np.int8), "b": np.ones(12, np.float32)},
        inputs="float[1, 12, n] x",
        nodes=("Conv_3",),
        message="an int8 convolution of 12 to 12 channels, kernel 1; "
        f"expected 16 channels or more on both sides; {KEEP}",
    ),
    "small-grouped-convolution": Broken(
        body=f"{INPUT} {WEIGHT} y = Conv<group = 16>(d, v, b)",
        values={"w": np.ones((16, 1, 2), np.int8)},
        nodes=("Conv_3",),
        message="an int8 grouped convolution of 16 channels, kernel 2; "
        f"expected a multiple of 8 channels, and a kernel of 3 or more; {KEEP}",
    ),
    "small-product": Broken(
        body=f"{INPUT} v = DequantizeLinear(square, t, o) y = MatMul(d, v)",
        inputs="float[1, n, 16] x",
        values={"square": np.ones((16, 8), np.int8)},
        nodes=("MatMul_3",),
        message=f"an int8 MatMul with a weight of 16 x 8; expected 16 or more on both axes; {KEEP}",
    ),
    "int4-weight": Broken(
        body="v = DequantizeLinear(i4, t, zero4) y = Conv(x, v, b)",
        values={
            "i4": onnx.helper.make_tensor("i4", onnx.TensorProto.INT4, [16, 16, 1], [1] * 256),
            "zero4": onnx.helper.make_tensor("zero4", onnx.TensorProto.INT4, [], [0]),
        },
        nodes=("DequantizeLinear_0",),
        message="a weight stored as int4, which a T4 does not take; expected int8; "
        "keep it for GPUs of 8.0 and newer",
    ),
    "float-residual": Broken(
        body=f"{CONV} a = Add(c, x) r = Relu(a) p = QuantizeLinear(r, s, z) "
        "e = DequantizeLinear(p, s, z) y = Conv(e, v, b)",
        nodes=("Add_4",),
        message="a float residual sum behind the quantized Conv; expected its other operand "
        "quantized, to fuse into an int8 result; quantize the other operand",
    ),
}
TENSORRT = {rule.name: rule for rule in RULES["tensorrt"]}
SLOWER = {rule.name: rule for rule in WARNINGS["tensorrt"]}
needs_library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)


def model(broken: Broken) -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : {broken.opset}, "own" : 1]>'
    proto = onnx.parser.parse_model(
        f"{text} g ({broken.inputs}) => (float[a, b, c] y) {{ {broken.body} }}"
    )
    read = {name for node in proto.graph.node for name in node.input}
    read -= {value.name for value in proto.graph.input}
    for name, value in {**VALUES, **broken.values}.items():
        if name in read:
            stored = value if isinstance(value, onnx.TensorProto) else array(name, value)
            proto.graph.initializer.append(stored)
    return proto


def array(name: str, value: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(value), name)


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert BROKEN.keys() == TENSORRT.keys() | SLOWER.keys()
    assert TENSORRT.keys().isdisjoint(SLOWER)


def test_the_clean_graph_breaks_none() -> None:
    graph = graph_from_model(model(Broken(body=CLEAN, nodes=(), message="")))
    assert check(graph, "tensorrt") == warn(graph, "tensorrt") == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found_and_no_other(name: str) -> None:
    broken = BROKEN[name]
    graph = graph_from_model(model(broken))
    found = [*check(graph, "tensorrt"), *warn(graph, "tensorrt")]
    assert [(p.rule, p.node) for p in found] == [(name, node) for node in broken.nodes]
    assert found[0].message == broken.message
    assert bool(warn(graph, "tensorrt")) == (name in SLOWER)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("rule", [*TENSORRT.values(), *SLOWER.values()], ids=lambda r: r.name)
def test_tensorrt_rtx_refuses_what_the_rule_says_it_does(tmp_path: Path, rule: Rule) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(BROKEN[rule.name]), path)
    refused = parse(path).refusals
    assert bool(refused) == (rule.refused_by == PARSER)
    assert all(refusal.node in {*BROKEN[rule.name].nodes, ""} for refusal in refused)
    if rule.refused_by == BUILDER:
        with pytest.raises(IntqError, match=r"cannot build it|crashed"):
            build(path)


SUPPORTED = """
import json, onnx, tensorrt_rtx as trt
log = trt.Logger(trt.Logger.ERROR)
parser = trt.OnnxParser(trt.Builder(log).create_network(0), log)
names = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
print(json.dumps(sorted(name for name in names if not parser.supports_operator(name))))
"""


@pytest.mark.slow
@needs_library
def test_the_parser_knows_all_operators_but_those_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUPPORTED], capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout.splitlines()[-1])) == OPERATORS
