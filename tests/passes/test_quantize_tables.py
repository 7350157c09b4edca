import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

QuantizeTables = load("quantize_tables")
FREE = "q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z)"
PART = "p = Slice(table, begin, n, axes)"


def graph(body: str, rows: int = 64, scales: int = 1, dtype: type = np.uint8) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (int64[1] n) => (float[] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    random = np.random.default_rng(0)
    values = {
        "table": random.normal(0, 1, (1, rows, 32)).astype(np.float32),
        "begin": np.array([0]),
        "axes": np.array([1]),
        "s": np.full(scales, 0.02, np.float32).reshape(() if scales == 1 else -1),
        "z": np.full(scales, 100, dtype).reshape(() if scales == 1 else -1),
    }
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted(read & set(values)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values[name]), name))
    return graph_from_model(model)


def store(model: gs.Graph) -> tuple[int, list[str]]:
    """Store; doing so again must change nothing, and the result must be the same to the bit."""

    def result() -> np.ndarray:
        session = Session(model_from_graph(model), threads=1, optimize=False)
        return session.run({"n": np.array([7])})["y"]

    before, ctx = result(), Context(facts={"quantized"})
    first, second = run(model, [QuantizeTables()] * 2, ctx, [well_formed])
    assert second.changes == 0
    np.testing.assert_array_equal(result(), before)
    return first.changes, [why for _, why in first.skipped]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "body", [f"{PART} {FREE}", f"t = Transpose(table) p = Slice(t, begin, n, axes) {FREE}"]
)
def test_a_table_becomes_bytes(body: str, dtype: type) -> None:
    model = graph(body, dtype=dtype)
    assert store(model) == (1, [])
    tables = [t for t in model.tensors().values() if isinstance(t, gs.Constant)]
    assert {t.values.dtype for t in tables if t.values.size > 1000} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    "body",
    [
        FREE.replace("(p,", "(table,"),
        f"{PART} {FREE.replace('y =', 'd =')} y = Sub(d, p)",
        f"{PART} {FREE.replace('y =', 'd =')} m = ReduceMax(table) y = Sub(d, m)",
        f"p = ReduceMax<axes = [0]>(table) {FREE} o = Identity(n)",
        f"r = Relu(table) p = Slice(r, begin, n, axes) {FREE}",
    ],
)
def test_other_constants_stay(body: str) -> None:
    assert store(graph(body)) == (0, [])


def test_small_ones_stay() -> None:
    assert store(graph(f"{PART} {FREE}", rows=8)) == (0, [])


def test_several_scales_are_named() -> None:
    free = FREE.replace("Linear(", "Linear<axis = 2>(")
    assert store(graph(f"{PART} {free}", scales=32)) == (0, ["it is quantized with several scales"])
