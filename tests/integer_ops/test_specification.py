"""The specification's own cases, from the onnx package, bit for bit."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto

from onnx_intq.integer_ops import OPS, indexing, layout
from onnx_intq.interpreter import Interpreter

QUANTIZATION = {
    "ConvInteger": 2,
    "DequantizeLinear": 14,
    "DynamicQuantizeLinear": 3,
    "MatMulInteger": 1,
    "QLinearConv": 1,
    "QLinearMatMul": 8,
    "QuantizeLinear": 16,
}
"""All 45 cases with such an operator; three of QuantizeLinear stand for DynamicQuantizeLinear."""

MOVES = {*indexing.OPS, *layout.OPS, "Identity", "Where"}
"""What gives its elements as it got them: its cases of floating-point numbers count as well."""

INTEGERS = {
    TensorProto.BOOL,
    *(TensorProto.DataType.Value(f"{u}INT{n}") for u in ("", "U") for n in (2, 4, 8, 16, 32, 64)),
}

# fmt: off
COUNTS = dict(  # noqa: C408  shorter
    Add=6, And=8, BitCast=4, BitShift=28, BitwiseAnd=4, BitwiseNot=3, BitwiseOr=4, BitwiseXor=4,
    Cast=8, CastLike=4, Clip=3, Compress=5, Concat=12, ConstantOfShape=3, CumProd=2, CumSum=2,
    DepthToSpace=2, Div=7, Equal=8, Expand=2, EyeLike=3, Flatten=9, Gather=4, GatherElements=3,
    GatherND=3, Greater=6, GreaterOrEqual=6, Identity=3, Less=6, LessOrEqual=6, Max=8, MaxPool=1,
    Min=8, Mod=10, Mul=6, NonZero=1, Not=3, OneHot=6, Or=8, Pad=6, Pow=2, Range=4, ReduceMax=2,
    ReduceMin=1, Reshape=10, ReverseSequence=3, Scatter=2, ScatterElements=7, ScatterND=7, Shape=11,
    Size=2, Slice=8, SpaceToDepth=4, Split=16, Squeeze=2, Sub=6, Tile=2, TopK=4, Transpose=7,
    Trilu=18, Unsqueeze=7, Where=2, Xor=8,
)
# fmt: on
"""Cases of one operator whose tensors are all integers or Booleans, or that only move elements."""

BODIES = 15
"""Such cases of several operators: functions written out."""


def operators(case: Any) -> set[str]:
    return {node.op_type for node in case.model.graph.node} - {"Constant"}


def integral(case: Any) -> bool:
    values = [*case.model.graph.input, *case.model.graph.output]
    return all(
        v.type.HasField("tensor_type")
        and (v.type.tensor_type.elem_type in INTEGERS or operators(case) <= MOVES)
        for v in values
    )


def family(case: Any) -> str | None:
    """Where a case counts; None where it is out of reach."""
    found = operators(case)
    if quantizing := found & QUANTIZATION.keys():
        return min(quantizing)
    if not found <= OPS.keys() or not integral(case):
        return None
    return min(found) if len(found) == 1 else "several"


@pytest.fixture(scope="module")
def cases() -> Mapping[str | None, list[Any]]:
    """The cases by family."""
    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        for case in collect_testcases():
            found[family(case)].append(case)
    return found


def array(value: Any) -> npt.NDArray[Any]:
    stored = isinstance(value, TensorProto)
    return np.asarray(onnx.numpy_helper.to_array(value) if stored else value)


def runs(case: Any) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """What is computed and what is wanted, for every output."""
    interpreter = Interpreter(case.model)
    names = [value.name for value in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        found = interpreter.run(dict(zip(names, map(array, inputs), strict=True)))
        yield from zip(found.values(), map(array, outputs), strict=True)


FAMILIES = {**QUANTIZATION, **COUNTS, "several": BODIES}


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(FAMILIES))
def test_the_cases_of_an_operator(cases: Mapping[str | None, list[Any]], operator: str) -> None:
    for case in cases[operator]:
        for have, want in runs(case):
            assert (have.dtype, have.shape) == (want.dtype, want.shape), case.name
            # As Python's numbers: ml_dtypes' types have no comparison of their own.
            assert have.astype(object).tolist() == want.astype(object).tolist(), case.name
    assert len(cases[operator]) >= FAMILIES[operator]  # newer packages may have more
