import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph, subgraphs
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import SameFunction, well_formed

FoldConstants = load("fold_constants")
X = np.array([[-2, 0.5, 1], [3, -4, 5]], np.float32)
CONSTANTS = """<float[3] c = {1, 2, 3}, float[3] d = {4, 5, 6}, float one = {1},
    int64[2] s = {2, 3}, int64[3] huge = {3000, 3000, 3000}, int64[1] three = {3}>"""


def graph(body: str, inputs: str = "float[2, 3] x", outputs: str = "float[2, 3] y") -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g ({inputs}) => ({outputs}) {CONSTANTS} {{ {body} }}"""
    return graph_from_model(onnx.parser.parse_model(text))


def ops(model: gs.Graph) -> list[str]:
    return [node.op for sub in subgraphs(model) for node in sub.nodes]


def fold(model: gs.Graph, **more: np.ndarray) -> tuple[int, list[tuple[str, str]]]:
    """Fold, check that the function stays, and that folding again changes nothing."""
    same, ctx = SameFunction({"x": X, **more}), Context()
    same.start(model)
    first, second = run(model, [FoldConstants()] * 2, ctx, [well_formed, same])
    assert second.changes == 0
    assert second.skipped == first.skipped
    return first.changes, list(first.skipped)


@pytest.mark.parametrize(
    ("body", "left", "count"),
    [
        ("a = Add(c, d) y = Mul(x, a)", ["Mul"], 1),
        ("a = Add(c, d) b = Sqrt(a) e = Mul(b, a) y = Mul(x, e)", ["Mul"], 3),
        ("a = ConstantOfShape(s) y = Add(x, a)", ["Add"], 1),
        ("a = Expand(c, s) y = Add(x, a)", ["Add"], 1),
        ("a, b = Split<axis = 0>(s) e = Concat<axis = 0>(a, b) y = Reshape(x, e)", ["Reshape"], 2),
        ("a = Clip(c, , one) y = Add(x, a)", ["Add"], 1),
        ("a, b = TopK<axis = 0>(c, three) e = Cast<to = 1>(b) y = Add(x, e)", ["Add"], 2),
        ("a = Add(c, c) y = Add(x, a)", ["Add"], 1),
    ],
)
def test_fires(body: str, left: list[str], count: int) -> None:
    model = graph(body)
    assert fold(model) == (count, [])
    assert ops(model) == left


def test_optional_results_that_nobody_wants_are_left_out() -> None:
    model = graph("a, , b = LayerNormalization(c, d) e = Mul(a, b) y = Add(x, e)")
    assert fold(model) == (2, [])
    assert ops(model) == ["Add"]


def test_an_output_may_be_constant() -> None:
    model = graph("y = Relu(x) z = Add(c, d)", outputs="float[2, 3] y, float[3] z")
    assert fold(model) == (1, [])
    found = Session(model_from_graph(model), threads=1).run({"x": X})
    np.testing.assert_array_equal(found["z"], [5, 7, 9])


@pytest.mark.parametrize("q", [True, False])
def test_bodies_are_folded_too(q: bool) -> None:
    body = """a = Add(c, d)
        y = If(q) <
            then_branch = yes () => (float[2, 3] t) { b = Neg(a) t = Add(x, b) },
            else_branch = no () => (float[2, 3] e) { f = Expand(c, s) e = Mul(f, a) }
        >"""
    model = graph(body, "float[2, 3] x, bool q")
    assert fold(model, q=np.array(q)) == (4, [])
    assert ops(model) == ["If", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Relu(x) y = Add(a, c)",
        "q = QuantizeLinear(c, one) a = DequantizeLinear(q, one) y = Add(x, a)",
        "a = RandomNormalLike(c) b = Mul(a, c) e = Sub(b, b) y = Add(x, e)",
        "a = com.microsoft.Gelu(c) y = Add(x, a)",
        "a = RandomNormal<shape = [3]>() b = Sub(a, a) y = Add(x, b)",
        "a = Dropout(c) y = Add(x, a)",
    ],
)
def test_leaves_alone_what_is_not_constant_or_must_stay(body: str) -> None:
    model = graph(body)
    before = ops(model)
    assert fold(model) == (0, [])
    assert ops(model) == before


def test_a_node_with_a_body_stays() -> None:
    body = """y = Add(x, c) z = If(flag) <
        then_branch = yes () => (float[3] t) { t = Add(c, d) },
        else_branch = no () => (float[3] e) { e = Sub(c, d) }
    >"""
    model = graph(body, outputs="float[2, 3] y, float[3] z")
    model.nodes[1].inputs[0] = gs.Constant("flag", np.array(True))
    assert fold(model)[0] == 2
    assert ops(model) == ["Add", "If"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Expand(one, huge) b = ReduceSum(a)",
        "t = Add(huge, huge) a = Expand(one, t) b = ReduceSum(a)",
    ],
)
def test_declines_what_would_enlarge_the_file_without_computing_it(body: str) -> None:
    model = graph(f"{body} y = Add(x, c)")
    ctx = Context()
    FoldConstants().run(model, ctx)
    assert [why for _, why in ctx.skipped] == ["constant, but its value would enlarge the file"]
    assert ctx.skipped[0][0].startswith("Expand")


@pytest.mark.parametrize(("more", "folded"), [(5, 2), (6, 0)])
def test_the_limit_is_a_mebibyte_more_than_the_inputs(more: int, folded: int) -> None:
    # Floats of 4 bytes; the inputs, a float and two int64, have 20 bytes: as many as 5 floats.
    model = graph("a = Expand(one, size) b = ReduceMax(a) y = Add(x, b)")
    model.nodes[0].inputs[1] = gs.Constant("size", np.array([(1 << 18) + more, 1]))
    assert FoldConstants().run(model, Context()) == folded


def test_declines_what_the_evaluator_cannot_compute() -> None:
    model = graph("a = Reshape(c, s) b = Shape(a) y = Add(x, c)")
    ctx = Context()
    assert FoldConstants().run(model, ctx) == 0
    ((name, why),) = ctx.skipped
    assert name == "Reshape_0"
    assert why.startswith("constant, but the reference evaluator fails: ")
    assert "\n" not in why
