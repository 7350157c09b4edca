import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import EPSILON, well_formed

FuseLayerNorm = load("fuse_layer_norm")
RANDOM = np.random.default_rng(0)
CONSTANTS = {
    "two": np.float32(2),
    "three": np.float32(3),
    "eps": np.float32(1e-3),
    "several": np.full(6, 1e-3, np.float32),
    "gamma": RANDOM.normal(1, 0.3, 6).astype(np.float32),
    "beta": RANDOM.normal(0, 0.3, 6).astype(np.float32),
    "scalar": np.float32(2),
    "rows": RANDOM.normal(1, 0.3, (5, 1)).astype(np.float32),
}
MEAN = "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m)"
VARIANCE = "q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) a = Add(v, eps) s = Sqrt(a)"
END = "n = Div(d, s) g = Mul(n, gamma) y = Add(g, beta)"


def graph(body: str, opset: int = 17) -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[n, 5, 6] x) => (float[n, 5, 6] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, values in CONSTANTS.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def outputs(model: gs.Graph, x: np.ndarray) -> np.ndarray:
    """As written: onnxruntime's own fusion overlooks an epsilon that is Add's first input."""
    session = Session(model_from_graph(model), threads=1, optimize=False)
    (result,) = session.run({"x": x}).values()
    return result


def fuse(model: gs.Graph) -> tuple[int, list[str]]:
    """Fuse; doing so again must change nothing, and the function must not."""
    x = RANDOM.normal(1, 3, (4, 5, 6)).astype(np.float32)
    before = outputs(model, x)
    first, second = run(model, [FuseLayerNorm()] * 2, Context(), [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    # Ten operators, each within an epsilon of results up to 4.
    np.testing.assert_allclose(outputs(model, x), before, rtol=0, atol=40 * EPSILON)
    return first.changes, [why for _, why in first.skipped]


NORMS = [
    f"{MEAN} {VARIANCE} {END}",
    f"{MEAN} {VARIANCE.replace('Pow(d, two)', 'Mul(d, d)')} {END}",
    f"{MEAN} {VARIANCE.replace('Add(v, eps)', 'Add(eps, v)')} {END}",
    f"{MEAN} {VARIANCE} n = Div(d, s) g = Mul(gamma, n) y = Add(beta, g)",
    f"{MEAN} {VARIANCE} r = Reciprocal(s) n = Mul(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    f"{MEAN} {VARIANCE} r = Reciprocal(s) n = Mul(r, d) y = Mul(n, gamma)",
    f"{MEAN} {VARIANCE} n = Div(d, s) y = Mul(n, gamma)",
    f"{MEAN} {VARIANCE} {END}".replace("axes = [-1]", "axes = [2]"),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("opset", [13, 17])
def test_a_decomposed_norm_becomes_one_node(norm: str, opset: int) -> None:
    model = graph(norm, opset)
    assert fuse(model) == (1, [])
    (node,) = model.nodes
    assert node.op == "LayerNormalization"
    assert node.attrs["epsilon"] == np.float32(1e-3)
    assert len(node.inputs) == (3 if "beta" in norm else 2)
    assert model.opset == 17


def test_axes_as_inputs() -> None:
    """Since opset 18."""
    body = f"{MEAN} {VARIANCE} {END}"
    for tensor in "xq":
        body = body.replace(f"<axes = [-1]>({tensor})", f"({tensor}, last)")
    assert fuse(graph(f"last = Constant<value_ints = [-1]>() {body}", 18)) == (1, [])


def test_an_add_of_another_tensor_is_not_its_bias() -> None:
    model = graph(f"{MEAN} {VARIANCE} n = Div(d, s) g = Mul(n, gamma) y = Add(g, x)")
    assert fuse(model) == (1, [])
    assert [node.op for node in model.nodes] == ["LayerNormalization", "Add"]


def test_two_norms_share_their_deviation() -> None:
    other = """p = Mul(d, d) w = ReduceMean<axes = [-1]>(p) b = Add(w, scalar) t = Sqrt(b)
        o = Div(d, t) k = Mul(o, beta) y = Add(g, k)"""
    model = graph(f"{MEAN} {VARIANCE} n = Div(d, s) g = Mul(n, gamma) {other}")
    assert fuse(model) == (2, [])
    assert [node.op for node in model.nodes] == ["LayerNormalization", "LayerNormalization", "Add"]


DECLINED = {
    "y = Sqrt(x)": "it is not the root of a variance and a constant",
    "a = Add(x, eps) y = Sqrt(a)": "it is not the root of a variance and a constant",
    f"{MEAN} {VARIANCE.replace('eps', 'several')} {END}": "it is not the root of a variance",
    f"{MEAN} {VARIANCE.replace('two', 'three')} {END}": "it is not the root of a variance",
    f"d = Neg(x) {VARIANCE} {END}": "it is not the root of a variance",
    f"d = Sub(x, beta) {VARIANCE} {END}": "what is squared is no deviation from the mean",
    f"{MEAN.replace('-1', '-2')} {VARIANCE} {END}": "what is squared is no deviation from the mean",
    f"{MEAN} {VARIANCE.replace('-1', '1')} {END}": "it is not the root of a variance",
    f"m = ReduceMean<axes = [-1]>(x) z = Neg(x) d = Sub(z, m) {VARIANCE} {END}": "what is squared",
    f"{MEAN} {VARIANCE} y = Div(d, s)": "its result does not divide the deviation and is multip",
    f"{MEAN} {VARIANCE} n = Div(x, s) y = Mul(n, gamma)": "its result does not divide",
    f"{MEAN} {VARIANCE} n = Div(d, s) y = Mul(n, scalar)": "its result does not divide",
    f"{MEAN} {VARIANCE} n = Div(d, s) y = Mul(n, rows)": "its result does not divide",
    f"{MEAN} {VARIANCE} n = Div(d, s) y = Add(n, gamma)": "its result does not divide",
    f"{MEAN} {VARIANCE} r = Reciprocal(s) n = Mul(x, r) y = Mul(n, gamma)": "its result does not",
    f"{MEAN} {VARIANCE} r = Reciprocal(s) n = Add(d, r) y = Mul(n, gamma)": "its result does not",
    f"{MEAN} {VARIANCE} n = Div(d, s) o = Mul(n, gamma) y = Add(s, o)": "its result does not",
}


@pytest.mark.parametrize("body", DECLINED)
def test_declines_with_the_reason(body: str) -> None:
    model = graph(body)
    ops = [node.op for node in model.nodes]
    changes, (why,) = fuse(model)
    assert changes == 0
    assert why.startswith(f"is no part of a layer normalisation: {DECLINED[body]}")
    assert [node.op for node in model.nodes] == ops


def test_a_model_without_a_root_is_not_converted() -> None:
    model = graph("y = Neg(x)", 13)
    assert fuse(model) == (0, [])
    assert model.opset == 13
