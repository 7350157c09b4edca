"""Ranges of results: no value of an operator lies outside, whatever its operands' values."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.lowering import constant_values
from onnx_intq.result_ranges import (
    BOUNDED,
    INCREASING,
    LEAST,
    NEGLIGIBLE,
    PRODUCTS,
    RULES,
    SAME,
    masked_logits,
    result_range,
)
from onnx_intq.runtime import Session
from onnx_intq.transform import Range

law = settings(max_examples=15, deadline=None)
X = (2, 6, 8)
RANDOM = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "one": np.float32(1),
    "low": np.float32(-0.7),
    "high": np.float32(1.3),
    "two": np.float32(2),
    "row": RANDOM.uniform(0.5, 2, 8),
    "w": RANDOM.standard_normal((4, 3, 3)),
    "wt": RANDOM.standard_normal((6, 2, 3)),
    "right": RANDOM.standard_normal((8, 5)),
    "left": RANDOM.standard_normal((5, 6)),
    "vector": RANDOM.standard_normal(8),
    "bias4": RANDOM.standard_normal(4),
    "bias8": RANDOM.standard_normal(8),
    "square": RANDOM.standard_normal((8, 8)),
    "gamma": RANDOM.standard_normal(8),
    "beta": RANDOM.standard_normal(8),
    "pads": np.array([0, 0, 2, 0, 1, 0]),
    "axis": np.array([-1]),
    "axes": np.array([1, 2]),
    "shape": np.array([2, 48]),
    "taken": np.array([1, 1, 0]),
}
CALLS = [
    *(f"{op}(x)" for op in sorted({*BOUNDED, *INCREASING, *LEAST})),
    *("Clip(x, low, high)", "Clip(x, , high)", "Clip(x, low)", "Clip(x)"),
    *(f"{op}(x, z)" for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *("Add(x, row)", "Sub(row, x)", "Mul(x, row)", "Div(x, row)", "Div(row, x)"),
    *("Concat<axis = 1>(x, z)", "Where(m, x, z)", "Where(m, x, low)", "Cast<to = 1>(m)"),
    *("Abs(x)", "Neg(x)", "LogSoftmax(x)", "LogSoftmax<axis = 1>(x)", "Pow(x, two)"),
    *("Elu(x)", "Selu(x)", "Celu(x)", "Log(x)", "Reciprocal(x)", "Atan(x)", "Asinh(x)", "Sinh(x)"),
    "Gelu<approximate = 'tanh'>(x)".replace("'", '"'),
    *("LayerNormalization(x, gamma, beta)", "LayerNormalization(x, gamma)"),
    *("LayerNormalization(x, one, beta)", "LayerNormalization<axis = 1>(x, gamma)"),
    *("Pad(x, pads)", "Pad(x, pads, high)", 'Pad<mode = "edge">(x, pads)'),
    *("ReduceSum(x, axis)", "ReduceSum(x, axes)", "ReduceSum(x)"),
    *("ReduceMean(x, axis)", "ReduceMax(x, axis)", "ReduceMin(x, axes)", "GlobalMaxPool(x)"),
    *("AveragePool<kernel_shape = [3]>(x)", "GlobalAveragePool(x)"),
    "AveragePool<kernel_shape = [3], pads = [2, 2], count_include_pad = 1>(x)",
    *(
        "MaxPool<kernel_shape = [3], pads = [1, 1]>(x)",
        "Transpose(x)",
        "Gather<axis = 1>(x, taken)",
    ),
    *("Conv<group = 2, pads = [1, 1]>(x, w, bias4)", "Conv<group = 2, dilations = [2]>(x, w)"),
    *("ConvTranspose<group = 2>(x, wt, bias4)", "ConvTranspose(x, wt)"),
    *("MatMul(x, right)", "MatMul(left, x)", "MatMul(x, vector)"),
    "Gemm<transB = 1, alpha = -0.5, beta = 2.0>(f, square, bias8)",
    *("Gemm(f, square)", "Gemm<transA = 1>(square, f)"),
]


def node(call: str, x_shape: tuple[int, ...] | None = X) -> tuple[gs.Graph, gs.Node]:
    """A graph of the one node that `call` makes of the inputs x, z, f (8 x 8) and m (booleans)."""
    opset = 24 if call.startswith("Swish") else 22
    inputs = {
        "x": "float[2, 6, 8]",
        "z": "float[2, 6, 8]",
        "f": "float[8, 8]",
        "m": "bool[2, 6, 8]",
    }
    used = [name for name in inputs if f"({name}" in call or f" {name}" in call]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g ({", ".join(f"{inputs[name]} {name}" for name in used)}) => (float y) {{ y = {call} }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name in {*model.graph.node[0].input} - {*used, ""}:
        values = np.asarray(CONSTANTS[name])
        values = values if values.dtype == np.int64 else values.astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = graph_from_model(model)
    for tensor in graph.inputs:
        tensor.shape = x_shape if tensor.name == "x" else tensor.shape
    return graph, graph.nodes[0]


def ranges(of: gs.Node, known: dict[str, Range]) -> list[Range | None]:
    """One range per input: those of the constants are theirs."""
    found: list[Range | None] = []
    for tensor in of.inputs:
        values = constant_values(tensor)
        constant = None if values is None else (float(values.min()), float(values.max()))
        found.append(known.get(tensor.name, constant))
    return found


@cache
def session(call: str) -> Session:
    return Session(model_from_graph(node(call)[0]), threads=1)


def drawn(data: st.DataObject, low: float = -12, high: float = 12) -> Range:
    """Ends in sixteenths."""
    integers = st.integers(round(low * 16), round(high * 16))
    first, last = sorted(data.draw(integers) / 16 for _ in range(2))
    return first, last


def within(limits: Range, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Values in a range: both ends, and others."""
    random = np.random.default_rng(seed)
    values = random.uniform(*limits, shape)
    ends = random.choice(np.array(limits), shape)
    return np.where(random.random(shape) < 0.5, ends, values).astype(np.float32)


@pytest.mark.parametrize("call", CALLS)
@law
@given(st.data())
def test_no_value_lies_outside(call: str, data: st.DataObject) -> None:
    _, made = node(call)
    low = 0.125 if made.op in {"Log", "Sqrt", "Reciprocal"} else -12
    known = {name: drawn(data, low) for name in ("x", "z", "f")}
    if call == "Div(x, z)":
        known["z"] = drawn(data, 0.125)
    if call == "Div(row, x)":
        known["x"] = drawn(data, -12, -0.125)
    found = result_range(made, ranges(made, known))
    assert found is not None
    seed = data.draw(st.integers(0, 99))
    feeds: dict[str, Any] = {
        name: within(known[name], (8, 8) if name == "f" else X, seed + i)
        for i, name in enumerate(known)
    }
    feeds["m"] = np.random.default_rng(seed).random(X) < 0.5
    model = session(call)
    (y,) = model.run({spec.name: feeds[spec.name] for spec in model.inputs}).values()
    # Sums of float32 products err by some 2^-20 of the largest addend; and GELU, by 2^-20 itself.
    slack = 2.0**-20 * (1 + max(map(abs, found)))
    assert found[0] - slack <= y.min()
    assert y.max() <= found[1] + slack


TIGHT = ["Relu(x)", "Exp(x)", "Neg(x)", "Add(x, z)", "Sub(x, z)", "Mul(x, z)", "Atan(x)"]
TIGHT += ["Clip(x, low, high)", "Pad(x, pads, high)", "Concat<axis = 1>(x, z)", "Pow(x, two)"]


@pytest.mark.parametrize("call", TIGHT)
def test_the_ends_are_reached(call: str) -> None:
    """Where operands do not depend on each other, the range is no wider than needed."""
    _, made = node(call)
    known = {"x": (1.5, 2.5), "z": (-0.5, 0.25)}
    found = result_range(made, ranges(made, known))
    assert found is not None
    model = session(call)
    feeds = {name: within(limits, X, seed) for seed, (name, limits) in enumerate(known.items())}
    (y,) = model.run({spec.name: feeds[spec.name] for spec in model.inputs}).values()
    assert (y.min(), y.max()) == pytest.approx(found, rel=1e-5)


def test_products_take_the_worst_signs() -> None:
    _, made = node("MatMul(left, x)")
    found = result_range(made, [None, (-1.5, 2.5)])
    left = np.asarray(CONSTANTS["left"], np.float32)
    highest = [np.where(row > 0, 2.5, -1.5) @ row for row in left]
    lowest = [np.where(row > 0, -1.5, 2.5) @ row for row in left]
    assert found == pytest.approx((min(lowest), max(highest)), rel=1e-5)


def test_every_rule_is_tried() -> None:
    tried = {node(call)[1].op for call in CALLS}
    moving = {"Expand", "Tile", "Split", "Slice", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
    moving |= {"DepthToSpace", "SpaceToDepth", "GatherElements", "GatherND", "Identity"}
    known = {*BOUNDED, *INCREASING, *SAME, *LEAST, *PRODUCTS, *RULES}
    assert known - tried <= moving


UNKNOWN = [
    ("Relu(x)", {}),
    ("Add(x, z)", {"x": (0.0, 1.0)}),
    ("Concat<axis = 1>(x, z)", {"x": (0.0, 1.0)}),
    ("Where(m, x, z)", {"z": (0.0, 1.0)}),
    ("Div(x, z)", {"x": (0.0, 1.0), "z": (0.0, 1.0)}),
    ("Reciprocal(x)", {"x": (-1.0, 1.0)}),
    ("Reciprocal(x)", {"x": (0.0, 1.0)}),
    ("MatMul(x, z)", {"x": (0.0, 1.0), "z": (0.0, 1.0)}),
    ("MatMul(x, right)", {}),
    ("Pow(x, row)", {"x": (0.0, 1.0)}),
    ("Pow(x, low)", {"x": (0.0, 1.0)}),
    ("Tan(x)", {"x": (0.0, 1.0)}),
    ("Abs(x)", {}),
    ("AveragePool<kernel_shape = [3]>(x)", {}),
    ("Pad(x, pads, f)", {"x": (0.0, 1.0)}),
    ("Clip(x, f)", {"x": (0.0, 1.0)}),
    ("Clip(x, low, f)", {"x": (0.0, 1.0)}),
    ("Conv(x, w, f)", {"x": (0.0, 1.0)}),
    ("LayerNormalization(x, f)", {"x": (0.0, 1.0)}),
    ("LayerNormalization(x, gamma, f)", {"x": (0.0, 1.0)}),
    ("ReduceSum(x, f)", {"x": (0.0, 1.0)}),
]


@pytest.mark.parametrize(("call", "known"), UNKNOWN)
def test_what_cannot_be_told(call: str, known: dict[str, Range]) -> None:
    _, made = node(call)
    assert result_range(made, ranges(made, known)) is None


@pytest.mark.parametrize(
    "call", ["LogSoftmax(x)", "ReduceSum(x, axis)", "LayerNormalization(x, gamma)"]
)
@pytest.mark.parametrize("shape", [None, (2, 6, "n")])
def test_lengths_must_be_known(call: str, shape: Any) -> None:
    _, made = node(call, shape)
    assert result_range(made, ranges(made, {"x": (0.0, 1.0)})) is None


def test_bounded_operators_need_no_operand() -> None:
    assert result_range(node("Sigmoid(x)")[1], [None]) == (0.0, 1.0)
    assert result_range(node("Cast<to = 1>(m)")[1], [None]) == (0.0, 1.0)
    _, made = node("Cast<to = 1>(x)")
    assert result_range(made, [(-1.0, 1.0)]) is None


def test_a_gated_tensor_is_a_swish() -> None:
    for product in ("Mul(x, s)", "Mul(s, x)"):
        model = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y)
            {{ s = Sigmoid(x) y = {product} }}"""
        )
        made = graph_from_model(model).nodes[1]
        known = ranges(made, {"x": (-9.0, 5.0), "s": (0.0, 1.0)})
        assert result_range(made, known) == (LEAST["Swish"], 5.0)


def test_masked_logits_reach_no_further_than_counts() -> None:
    assert masked_logits([(-3.0, 5.0), (-1e9, -1e9)]) == (-3.0 - NEGLIGIBLE, 5.0)
    assert masked_logits([(-np.inf, -np.inf), (-3.0, 5.0)]) == (-3.0 - NEGLIGIBLE, 5.0)
    assert masked_logits([(-3.0, 5.0), (-20.0, -20.0)]) is None
    assert masked_logits([(-3.0, 5.0), None]) is None
    assert np.exp(-NEGLIGIBLE) < 2.0**-34
