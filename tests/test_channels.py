import re
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.channels import Group, groups
from onnx_intq.graph import Names, graph_from_model, model_from_graph
from onnx_intq.runtime import Session

law = settings(deadline=None, max_examples=10)
ATTENTION = """l = LayerNormalization(x, gamma, beta)
    q0 = MatMul(l, wq)
    q1 = Add(bq, q0)
    q2 = Reshape(q1, heads)
    q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
    q = Mul(q3, half)
    k0 = MatMul(l, wk)
    k1 = Reshape(k0, heads)
    k = Transpose<perm = [0, 2, 3, 1]>(k1)
    v0 = MatMul(l, wv)
    v1 = Reshape(v0, heads)
    v = Transpose<perm = [0, 2, 1, 3]>(v1)
    a = MatMul(q, k)
    p = Softmax(a)
    c0 = MatMul(p, v)
    c1 = Transpose<perm = [0, 2, 1, 3]>(c0)
    c2 = Reshape(c1, flat)
    y = MatMul(c2, wo)"""
GELU = """l = MatMul(x, wq)
    d = Div(l, root)
    e = Erf(d)
    f = Add(e, one)
    g = Mul(l, f)
    h = Mul(g, half)
    y = MatMul(h, wo)"""
GLU = """t = Transpose<perm = [0, 2, 1]>(x)
    u = Conv(t, wu, bu)
    a, b = Split<axis = 1>(u)
    s = Sigmoid(b)
    m = Mul(a, s)
    z = Where(mask, zero, m)
    c = Conv<group = 4, pads = [1, 1]>(z, wc)
    r = Relu(c)
    e = Conv(r, we)
    y = Transpose<perm = [0, 2, 1]>(e)"""
RESIDUAL = """t = Transpose<perm = [0, 2, 1]>(x)
    u = Conv(t, wd, bo)
    w = Conv(t, we2)
    s = Add(u, w)
    r = LeakyRelu(s)
    p = Pad(r, pads)
    o = MaxPool<kernel_shape = [3], strides = [1]>(p)
    e = Conv(o, wd)
    y = Transpose<perm = [0, 2, 1]>(e)"""
SHAPES: dict[str, Any] = {
    "gamma": (8,), "beta": (8,), "wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8), "bq": (8,),
    "wu": (8, 8, 1), "bu": (8,), "wc": (4, 1, 3), "we": (8, 4, 1), "we2": (8, 8, 1),
    "wd": (8, 8, 1), "bo": (8,),
}  # fmt: skip
BODIES = {"attention": ATTENTION, "gelu": GELU, "glu": GLU, "residual": RESIDUAL}


def graph(body: str) -> gs.Graph:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 5, 8] x, bool[1, 1, 5] mask) => (float[1, 5, 8] y)
        <int64[4] heads = {{0, 0, 2, 4}}, int64[3] flat = {{0, 0, 8}}, float half = {{0.5}},
         float one = {{1.0}}, float root = {{1.4}}, float zero = {{0.0}},
         int64[6] pads = {{0, 0, 1, 0, 0, 1}}> {{ {body} }}"""
    )
    for name, shape in SHAPES.items():
        if name in body:
            values = random.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def found(model: gs.Graph) -> list[Group]:
    return [group for _, group in groups(model) if isinstance(group, Group)]


@law
@given(st.sampled_from(sorted(BODIES)), st.integers(0, 3))
def test_any_factors_keep_the_function(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    feeds = {
        "x": random.standard_normal((1, 5, 8)).astype(np.float32),
        "mask": random.random((1, 1, 5)) < 0.3,
    }
    model = graph(BODIES[name])
    before = Session(model_from_graph(model)).run(feeds)["y"]
    names = Names(model)
    all_groups = found(model)
    assert all_groups
    for group in all_groups:
        group.scale(np.exp2(random.uniform(-3, 3, group.size)), names)
    after = Session(model_from_graph(model)).run(feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max())


def test_finds_the_groups_of_attention() -> None:
    sizes = {tuple(sorted(group.tensors)): group.size for group in found(graph(ATTENTION))}
    assert sizes == {
        ("l",): 8,
        ("k", "k0", "k1", "q", "q0", "q1", "q2", "q3"): 8,
        ("c0", "c1", "c2", "v", "v0", "v1"): 8,
    }


def test_a_constant_factor_takes_in_what_an_activation_cannot_pass() -> None:
    (group,) = found(graph(GELU))
    assert set(group.tensors) == {"h"}
    assert {e.node.op for e in group.edits} == {"Mul", "MatMul"}


def test_the_gate_of_a_glu_keeps_its_scale() -> None:
    model = graph(GLU)
    first, second = found(model)
    assert set(first.tensors) == {"z", "m", "a", "u"}
    assert set(second.tensors) == {"r", "c"}
    first.scale(np.full(4, 2.0), Names(model))
    w = model.tensors()["wu"].values
    np.testing.assert_array_equal(w[:4], graph(GLU).tensors()["wu"].values[:4] * 2)
    np.testing.assert_array_equal(w[4:], graph(GLU).tensors()["wu"].values[4:])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("b = MatMul(wo, x2) c = MatMul(x, b) y = MatMul(c, wq)", "constant|is an|way|head|known"),
        ("a = MatMul(x, wq) c = MatMul(a, dyn) y = MatMul(c, wo)", "is an"),
        ("a = MatMul(x, wq) f = Where(mask, a, filled) y = MatMul(f, wo)", "fills in"),
        ("l = LayerNormalization(x, scale) y = MatMul(l, wq)", "no constants"),
        ("a = MatMul(x, wq) b = Add(a, one) c = Div(b, a) y = MatMul(c, wo)", "Div"),
        ("a = MatMul(x, wq) b = Add(a, row) y = MatMul(b, wo)", "broadcast"),
        ("y = MatMul(x, wq)", "is an input"),
        ("s = Sigmoid(x) y = MatMul(s, wq)", "Sigmoid"),
        ("a = MatMul(x, wq) b = Mul(a, a) y = MatMul(b, wq)", "in two ways|multiplies|is an"),
        ("a = MatMul(x, wq) b = Sigmoid(a) c = MatMul(a, wk) y = Add(b, c)", "Sigmoid"),
        ("a = MatMul(x, wq) b = Reshape(a, half2) y = MatMul(b, wo)", "reshape|not known"),
        ("l = LayerNormalization<axis = 1>(x, gamma2) y = MatMul(l, wq)", "several axes"),
        ('a = MatMul(x, wq) b = Pad<mode = "edge">(a, p3) y = MatMul(b, wq)', "Pad"),
        ("a = MatMul(x, wq) t = Transpose<perm = [0, 2, 1]>(a) y = MatMul(t, a)", "mix|is an|way"),
    ],
)
def test_says_what_is_in_the_way(body: str, why: str) -> None:
    text = body.replace("b = Reshape(a, half2)", "h = Reshape(a, flat2) b = Reshape(h, flat)")
    model_text = text.replace("gamma2", "gg").replace("p3", "pads")
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 5, 8] x, float[8, 5] x2, float[8, 8] dyn, float[8] scale, float[1] row,
           bool[1, 5, 1] mask) => (float y)
        <float one = {{1.0}}, float filled = {{2.0}},
         int64[2] flat2 = {{4, 10}}, int64[3] flat = {{1, 5, 8}},
         int64[6] pads = {{0, 1, 0, 0, 1, 0}}> {{ {model_text} }}"""
    )
    for name, shape in {**SHAPES, "gg": (5, 8)}.items():
        if name in model_text:
            values = random.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    reasons = [r for _, r in groups(graph_from_model(model)) if isinstance(r, str)]
    assert any(re.search(why, reason) for reason in reasons), reasons
