"""Constants that a Q/DQ model quantizes at run time: `complete_qdq` stores their integers."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

CompleteQdq = load("complete_qdq")
RANDOM = np.random.default_rng(0)
INPUT = RANDOM.uniform(-1.9, 3, (2, 4, 8)).astype(np.float32)
M = RANDOM.standard_normal((8, 5)).astype(np.float32)


def graph(attrs: str, outputs: str = "float y", **constants: Any) -> Any:
    """x times the constant m, which is quantized by ws and wz to u; the product to d."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[2, 4, 8] x) => ({outputs}) {{
            p = QuantizeLinear(x, xs, xz) a = DequantizeLinear(p, xs, xz)
            u = QuantizeLinear{attrs}(m, ws, wz) v = DequantizeLinear{attrs}(u, ws, wz)
            c = MatMul(a, v) d = QuantizeLinear(c, ys, xz) y = DequantizeLinear(d, ys, xz)
        }}"""
    )
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    fixed = {"xs": np.float32(0.02), "xz": np.uint8(100), "ys": np.float32(0.05), "m": M}
    for name, values in (fixed | constants).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def complete(model: gs.Graph) -> None:
    ctx = Context(facts={"quantized"})
    first, second = run(model, [CompleteQdq()] * 2, ctx, [well_formed])
    assert (first.changes, second.changes, ctx.remaining) == (0, 0, [])


def outputs(model: gs.Graph) -> Any:
    """As the nodes say: some fusions of onnxruntime's optimizer fail on such graphs."""
    return Session(model_from_graph(model), threads=1, optimize=False).run({"x": INPUT})


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_weights_quantized_at_run_time_are_stored(axis: int | None, dtype: str) -> None:
    size = 1 if axis is None else (8, 5)[axis]
    scales = np.linspace(0.01, 0.02, size).astype(np.float32)
    constants: dict[str, Any] = {"ws": scales, "wz": np.full(size, 3, dtype)}
    if axis is None:
        constants = {name: values[0] for name, values in constants.items()}
    # Every product of a scale and a half is a tie, and its neighbours are not.
    m = (RANDOM.integers(-99, 99, (8, 5)) + 0.5) * (scales if size != 8 else scales[:, None])
    m = np.nextafter(m.astype(np.float32), RANDOM.choice([-9, 0, 9], (8, 5)).astype(np.float32))
    attrs = f"<axis = {1 if axis is None else axis}>"
    model = graph(attrs, m=m, **constants)
    before = outputs(graph(attrs, f"float y, {dtype} u", m=m, **constants))
    complete(model)
    weight = model.tensors()["u"]
    assert isinstance(weight, gs.Constant)
    np.testing.assert_array_equal(weight.values, before["u"])
    np.testing.assert_array_equal(outputs(model)["y"], before["y"])


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("<axis = 1>", {"ws": np.ones(5, np.float32), "wz": np.arange(5, dtype=np.int8)}),
    (
        "<axis = 0, block_size = 4>",
        {"ws": np.full((2, 5), 0.1, np.float32), "wz": np.zeros((2, 5), np.int8)},
    ),
    (
        "<axis = 0, block_size = 4>",
        {"ws": np.full(2, 0.1, np.float32), "wz": np.zeros(2, np.int8), "m": M[:, 0]},
    ),
]


@pytest.mark.parametrize(("attrs", "constants"), OTHERS)
def test_other_quantized_constants_stay(attrs: str, constants: dict[str, Any]) -> None:
    model = graph(attrs, **constants)
    before = outputs(model)["y"]
    complete(model)
    assert isinstance(model.tensors()["u"], gs.Variable)
    np.testing.assert_array_equal(outputs(model)["y"], before)
