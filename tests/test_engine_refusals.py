import re
from typing import Any

import onnx
import pytest

from onnx_intq.engine_log import one_line
from onnx_intq.engine_refusals import Refusal, failure, plain, refusals

HEADER = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]>'
MODEL = f"""{HEADER} g (float[4, 4] x) => (float[4, 4] y, float[4, 4] v)
    <float s = {{0.1}}, int8 z = {{3}}, int8 c = {{2}}> {{
        k = Constant<value_float = 2.0>()
        [named] a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        [odd] d = own.Odd(b)
        e = Cast<to = 1>(c)
        f = Mul(d, e)
        y = Mul(f, k)
        ["v/deep"] v = MatMul(x, x)
    }}"""


def found(index: int, reason: str = "false", **changes: Any) -> Refusal:
    entry = {"index": index, "name": "", "operator": "Op", "reason": reason, "function": ""}
    (refusal,) = refusals(onnx.parser.parse_model(MODEL), [entry | changes])
    return refusal


def test_no_refusal_is_none() -> None:
    assert refusals(onnx.ModelProto(), []) == ()


def test_nodes_have_the_names_that_check_calls_them() -> None:
    assert [found(i).node for i in (1, 2, 4, 7)] == [
        "named",
        "DequantizeLinear_1",
        "Cast_3",
        "v/deep",
    ]


def test_a_rule_that_is_broken_at_the_node_is_the_advice() -> None:
    refusal = found(1, "Assertion failed: isZero(z): Non-zero zero point is not supported.")
    assert refusal.reason == "Non-zero zero point is not supported."
    assert refusal.advice.startswith("rule zero-point: zero point 3; expected 0")
    assert str(refusal) == f"node 'named' (Op): {refusal.reason}; {refusal.advice}"


@pytest.mark.parametrize(
    ("reason", "expected", "advice"),
    [
        ("false", "operator Op is not supported", "use an operator it has; .*--target tensorrt$"),
        ("odd", "odd", "^see what onnx-intq check --target tensorrt says$"),
        ("", "it gives no reason", "^see what"),
        ("bad shape", "bad shape", "^give --shapes"),
    ],
)
def test_without_a_broken_rule_the_words_decide(reason: str, expected: str, advice: str) -> None:
    refusal = found(6, reason)
    assert refusal.reason == expected
    assert re.search(advice, refusal.advice)


def test_a_refusal_may_be_of_no_node() -> None:
    refusal = found(-1, "Failed to import initializer: w", operator="")
    assert str(refusal).startswith("the model: Failed to import initializer: w; leave out -a 16")


def test_nodes_of_functions_are_named_with_the_function() -> None:
    refusal = found(0, name="", operator="Swoosh", function="node_of_y (f)")
    assert refusal.node == "number 0 of node_of_y (f)"
    assert found(0, name="inner", function="f").node == "inner of f"


def test_a_node_the_file_does_not_have_keeps_the_parsers_name() -> None:
    assert found(99, name="made up").node == "made up"
    assert found(0).node == "number 0"  # a Constant, which loading turns into an initializer


@pytest.mark.parametrize(
    ("reason", "start"),
    [
        ("Cannot compile operation 'node_of_y' for SM75", "node 'Mul_5' (Mul): Cannot"),
        ("no kernel for v/deep: sorry", "node 'v/deep' (MatMul): no"),
        ("Quantized constant (c) is", "node 'Cast_3' (Cast): Quantized constant (c) is; rule int"),
        ("v is a shape", "v is a shape; give --shapes"),
        ("out of luck", "out of luck; see what"),
    ],
)
def test_the_builders_words_tell_the_node(reason: str, start: str) -> None:
    assert failure(onnx.parser.parse_model(MODEL), reason).startswith(start)


ASSERTED = """Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.
Please set kENABLE_UINT8_AND_ASYMMETRIC to enable it if it is on DLA"""
INVALID = """Invalid Node - node_of_b ITensor::getDimensions: Error Code 4: API Usage Error
(node_of_b: input has type Int32. In checkType at /_src/optimizer/nodeBase.cpp:456)
[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In a at /_src/b.cpp)"""
UNKNOWN = 'creator && "Plugin not found, are the plugin name and version correct?"'
BUILDER = """IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any
implementation for node {ForeignNode[a...b]}. In computeCosts at /_src/a.cpp:1)"""


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (ASSERTED, "Non-zero zero point is not supported"),
        (INVALID, "API Usage Error (node_of_b: input has type Int32)"),
        (UNKNOWN, "Plugin not found, are the plugin name and version correct?"),
        (
            BUILDER,
            "Internal Error (Could not find any implementation for node {ForeignNode[a...b]})",
        ),
    ],
)
def test_places_in_the_librarys_source_are_left_out(reason: str, expected: str) -> None:
    assert plain(one_line(reason)) == expected
