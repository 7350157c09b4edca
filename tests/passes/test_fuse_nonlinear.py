from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.registry import load
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import SameFunction, well_formed

FuseNonlinear = load("fuse_nonlinear")
CONSTANTS = {
    "one": 1.0,
    "half": 0.5,
    "two": 2.0,
    "three": 3.0,
    "six": 6.0,
    "sixth": 1 / 6,
    "root": np.sqrt(2),
    "inverse": np.sqrt(0.5),
    "digits": 1.414214,
    "rough": 1.41,
    "cubic": 0.044715,
    "slope": np.sqrt(2 / np.pi),
    "zero": 0.0,
    "double": 2 * np.sqrt(2 / np.pi),
}


def graph(body: str, opset: int = 17, shape: str = "n, 6") -> gs.Graph:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, value in CONSTANTS.items():
        values = np.full((1,) if name == "one" else (), value, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def fuse(model: gs.Graph) -> tuple[int, list[str]]:
    """Fuse; doing so again must change nothing, and the function must not."""
    random = np.random.default_rng(0)
    same = SameFunction({"x": random.normal(0, 3, (50, 6)).astype(np.float32)})
    same.start(model)
    ctx = Context()
    first, second = run(model, [FuseNonlinear()] * 2, ctx, [well_formed, same])
    assert second.changes == 0
    assert second.skipped == first.skipped
    return first.changes, [why for _, why in first.skipped]


ERF = "d = Div(x, root) e = Erf(d) p = Add(e, one)"
TANH = "q = Pow(x, three) k = Mul(q, cubic) s = Add(x, k) m = Mul(s, slope) t = Tanh(m)"
CHAINS: dict[str, str] = {
    f"{ERF} h = Mul(x, p) y = Mul(h, half)": "Gelu",
    f"{ERF} h = Mul(x, half) y = Mul(p, h)": "Gelu",
    f"{ERF} h = Mul(half, p) y = Mul(h, x)": "Gelu",
    "d = Mul(inverse, x) e = Erf(d) p = Add(one, e) h = Mul(p, x) y = Div(h, two)": "Gelu",
    "d = Div(x, digits) e = Erf(d) p = Add(one, e) h = Mul(p, x) y = Div(h, two)": "Gelu",
    f"{TANH} p = Add(t, one) h = Mul(x, half) y = Mul(h, p)": "Gelu tanh",
    "q = Mul(x, x) r = Mul(q, x) k = Mul(cubic, r) s = Add(k, x) m = Mul(slope, s) t = Tanh(m) "
    "p = Add(one, t) h = Mul(p, x) y = Mul(half, h)": "Gelu tanh",
    "q = Pow(x, three) k = Mul(q, cubic) s = Add(x, k) m = Mul(s, double) t = Sigmoid(m) "
    "y = Mul(x, t)": "Gelu tanh",
    "a = Add(x, three) k = Clip(a, zero, six) h = Mul(x, k) y = Div(h, six)": "HardSwish",
    "a = Add(x, three) k = Clip(a, zero, six) h = Mul(k, sixth) y = Mul(x, h)": "HardSwish",
    "k = HardSigmoid<alpha = 0.16666667>(x) y = Mul(x, k)": "HardSwish",
    "s = Softplus(x) t = Tanh(s) y = Mul(x, t)": "Mish",
    "e = Exp(x) p = Add(e, one) s = Log(p) t = Tanh(s) y = Mul(x, t)": "Mish",
    "e = Exp(x) p = Add(e, one) y = Log(p)": "Softplus",
    "n = Neg(x) e = Exp(n) p = Add(e, one) y = Div(one, p)": "Sigmoid",
    "n = Neg(x) e = Exp(n) p = Add(one, e) y = Reciprocal(p)": "Sigmoid",
    "e = Exp(x) p = Add(one, e) y = Div(e, p)": "Sigmoid",
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_becomes_the_operator_it_computes(chain: str) -> None:
    model = graph(chain)
    assert fuse(model) == (2 if "Exp" in chain and CHAINS[chain] == "Mish" else 1, [])
    (node,) = model.nodes
    found = f"{node.op} {node.attrs.get('approximate', '')}".strip()
    assert found == CHAINS[chain]
    assert model.opset == 20
    assert [t.name for t in node.outputs] == ["y"]


def test_the_variable_may_be_made_by_elementwise_operators_itself() -> None:
    body = "z = Add(x, x) w = Mul(z, half) " + ERF.replace("x", "w")
    model = graph(body + " h = Mul(w, p) g = Mul(h, half) y = Add(g, x)")
    assert fuse(model) == (1, [])
    assert [node.op for node in model.nodes] == ["Add", "Mul", "Gelu", "Add"]


def test_what_others_read_stays() -> None:
    model = graph(f"{ERF} h = Mul(x, p) g = Mul(h, half) y = Add(g, e)")
    changes, skipped = fuse(model)
    assert changes == 1
    assert skipped == ["what is made of it is no operator that is known here"]
    assert [node.op for node in model.nodes] == ["Div", "Erf", "Gelu", "Add"]


DECLINED = [
    "d = Div(x, rough) e = Erf(d) p = Add(e, one) h = Mul(x, p) y = Mul(h, half)",
    f"{ERF} h = Mul(x, p) y = Mul(h, two)",
    f"{ERF} z = Identity(x) h = Mul(z, p) y = Mul(h, half)",
    "d = Div(x, root) e = Erf(d) p = Add(e, x) h = Mul(x, p) y = Mul(h, half)",
    "y = Erf(x)",
]


@pytest.mark.parametrize("chain", DECLINED)
def test_declines_other_functions(chain: str) -> None:
    model = graph(chain)
    ops = [node.op for node in model.nodes]
    assert fuse(model) == (0, ["what is made of it is no operator that is known here"])
    assert [node.op for node in model.nodes] == ops
    assert model.opset == 17


@pytest.mark.parametrize(
    "chain",
    [
        "s = Sigmoid(x) y = Mul(x, s)",
        "t = Tanh(x) y = Mul(t, half)",
        "y = Sigmoid(x)",
        "e = Exp(x) y = Mul(e, half)",
        "k = Clip(x, zero, six) y = Mul(k, sixth)",
    ],
)
def test_leaves_what_is_no_chain_alone(chain: str) -> None:
    model = graph(chain)
    assert fuse(model) == (0, [])
    assert model.opset == 17


def test_a_constant_that_adds_an_axis_is_no_scalar() -> None:
    model = graph(f"{ERF} h = Mul(x, p) y = Mul(h, half)", shape="n")
    for node in model.nodes:
        for tensor in node.inputs:
            if tensor.name == "half":
                tensor.values = tensor.values.reshape(1, 1)
    model.tensors()["y"].shape = (1, "n")
    assert FuseNonlinear().run(model, Context()) == 0


def test_a_model_that_cannot_have_opset_20_is_refused() -> None:
    model = graph(f"{ERF} h = Mul(x, p) g = Mul(h, half) y = Unknown(g)")
    with pytest.raises(PassError, match="fuse_nonlinear: opset 17 cannot be raised to 20"):
        run(model, [FuseNonlinear()], Context())


def test_long_chains_take_linear_time() -> None:
    """A thousand nodes are looked at from each end, but no farther than the longest chain."""
    body = " ".join(f"t{i + 1} = Mul(t{i}, half)" for i in range(1000))
    model: Any = graph(f"t0 = Tanh(x) {body} y = Add(t1000, x)")
    assert FuseNonlinear().run(model, Context()) == 0
