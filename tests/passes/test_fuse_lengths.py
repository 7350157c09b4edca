import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

FuseLengths = load("fuse_lengths")
CONSTANTS = {"one": 1.0, "two": 2.0, "three": 3.0, "half": 0.5, "nothing": 0.0, "minus": -2.0}
LENGTHS = np.array([0, 1, 2, 3, 7, 100, 101, (1 << 24) - 8])
CONVOLUTION = "a = Add({}, one) b = Add(one, a) c = Sub(b, three) d = Div(c, two) e = Floor(d)"


def graph(body: str, dtype: str = "int64") -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({dtype}[n] length) => (int64[n] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted(read & set(CONSTANTS)):
        tensor = onnx.numpy_helper.from_array(np.array(CONSTANTS[name], np.float32), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


def fuse(model: gs.Graph) -> tuple[int, list[str]]:
    """Fuse; doing so again must change nothing, and the function must not."""
    feeds = {"length": LENGTHS.astype(model.inputs[0].dtype)}
    before = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    first, second = run(model, [FuseLengths()] * 2, Context(), [well_formed])
    assert second.changes == 0
    after = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    np.testing.assert_array_equal(after, before)
    return first.changes, [why for _, why in first.skipped]


def floats(model: gs.Graph) -> int:
    return sum(t.dtype == np.float32 for n in model.nodes for t in n.outputs)


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize(
    "body",
    [
        "f = Cast<to = 1>(length) y = Cast<to = 7>(f)",
        f"f = Cast<to = 1>(length) {CONVOLUTION.format('f')} g = Add(e, one) y = Cast<to = 7>(g)",
        "f = Cast<to = 1>(length) a = Sub(f, one) b = Div(a, two) y = Cast<to = 7>(b)",
        "f = Cast<to = 1>(length) a = Sub(three, f) b = Mul(a, two) y = Cast<to = 7>(b)",
    ],
)
def test_a_chain_becomes_integers(body: str, dtype: str) -> None:
    model = graph(body, dtype)
    assert fuse(model) == (1, [])
    assert floats(model) == 0


def test_two_convolutions_as_nemo_writes_them() -> None:
    body = f"""f = Cast<to = 1>(length) {CONVOLUTION.format("f").replace("e = Floor(d)", "")}
        t = Cast<to = 7>(d) e = Cast<to = 1>(t) g = Add(e, one) h = Sub(g, one) i = Div(h, two)
        u = Cast<to = 7>(i) j = Cast<to = 1>(u) k = Add(j, one) y = Cast<to = 7>(k)"""
    model = graph(body)
    assert fuse(model) == (3, [])
    assert floats(model) == 0


@pytest.mark.parametrize(
    "body",
    [
        "f = Cast<to = 1>(length) a = Add(f, half) y = Cast<to = 7>(a)",
        "f = Cast<to = 1>(length) a = Div(f, two) b = Add(a, one) y = Cast<to = 7>(b)",
        "f = Cast<to = 1>(length) a = Div(f, minus) y = Cast<to = 7>(a)",
        "f = Cast<to = 1>(length) a = Exp(f) b = Mul(a, nothing) y = Cast<to = 7>(b)",
        "f = Cast<to = 1>(length) a = Add(f, f) y = Cast<to = 7>(a)",
        "f = Cast<to = 1>(length) a = Floor(f) b = Neg(a) y = Cast<to = 7>(b)",
        "b = Cast<to = 9>(length) f = Cast<to = 1>(b) y = Cast<to = 7>(f)",
    ],
)
def test_it_declines(body: str) -> None:
    assert fuse(graph(body)) == (0, ["what it casts is no whole-number arithmetic on integers"])


def test_the_floats_of_a_signal_are_no_lengths() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n] x) => (int64[n] y) { y = Cast<to = 7>(x) }"""
    model = graph_from_model(onnx.parser.parse_model(text))
    (report,) = run(model, [FuseLengths()], Context(), [well_formed])
    assert report.changes == 0


@given(
    st.lists(st.tuples(st.sampled_from(["Add", "Sub", "Mul"]), st.integers(-9, 9)), max_size=3),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_whole_number_arithmetic_stays_the_same(
    steps: list[tuple[str, int]], divisor: int, floor: bool
) -> None:
    CONSTANTS.update({f"c{i}": float(value) for i, (_, value) in enumerate(steps)})
    CONSTANTS["by"] = float(divisor)
    body, last = "f = Cast<to = 1>(length)", "f"
    for i, (op, _) in enumerate(steps):
        body, last = f"{body} s{i} = {op}({last}, c{i})", f"s{i}"
    end = "q = Floor(d) y = Cast<to = 7>(q)" if floor else "y = Cast<to = 7>(d)"
    model = graph(f"{body} d = Div({last}, by) {end}")
    feeds = {"length": LENGTHS[:-1]}
    before = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    (report,) = run(model, [FuseLengths()], Context(), [well_formed])
    assert report.changes == 1
    after = Session(model_from_graph(model), threads=1).run(feeds)["y"]
    np.testing.assert_array_equal(after, before)
