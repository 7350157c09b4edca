from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, run
from onnx_intq.verify import SameFunction, well_formed

Equalize = load("equalize")
(EQUALIZE,) = parse("equalize(shift=0.1)")
LOUD = np.array([40.0, 1, 1, 1, 1, 1], np.float32)
"""Six channels, one of them forty times as loud."""
DEPTHWISE = """d = Conv<group = 6, pads = [1, 1]>(x, wd)
    p = Conv(d, wp, bp)
    y = Softmax(p)"""
NORM = """t = Transpose<perm = [0, 2, 1]>(x)
    l = LayerNormalization(t, gamma, beta)
    q = MatMul(l, wq)
    k = MatMul(l, wk)
    y = Add(q, k)"""
SHAPES: dict[str, Any] = {
    "wd": (6, 1, 3), "wp": (5, 6, 1), "bp": (5,), "gamma": (6,), "beta": (6,), "wq": (6, 4),
    "wk": (6, 4),
}  # fmt: skip


def graph(body: str, y: str, loud: str, axis: int = 0) -> gs.Graph:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 6, 16] x) => (float{y} y) {{ {body} }}"""
    )
    for name, shape in SHAPES.items():
        if f"{name}" not in body:
            continue
        values = random.standard_normal(shape).astype(np.float32)
        if name == loud:
            values *= LOUD.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        elif loud and name in {"wp", "wq", "wk"}:  # what is loud counts no more than the others
            values /= LOUD.reshape([-1 if i == (name == "wp") else 1 for i in range(len(shape))])
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def context() -> Context:
    random = np.random.default_rng(1)
    feeds = [{"x": random.standard_normal((4, 6, 16)).astype(np.float32)} for _ in range(4)]
    return Context(facts={"bn-folded", "data"}, feeds=feeds)


def error(model: gs.Graph, ctx: Context) -> float:
    """Of the outputs of the model in 8 bits, squared."""
    exact = Session(model_from_graph(model))
    copy = model.copy()
    given = Context(facts={"bn-folded", "calibrated"})
    given.ranges = calibrate(copy, ctx.feeds).select("mse")
    run(copy, parse("insert_qdq, quantize_weights"), given)
    ours = Session(model_from_graph(copy))
    return sum(float(np.square(ours.run(b)["y"] - exact.run(b)["y"]).sum()) for b in ctx.feeds)


@pytest.mark.parametrize(
    ("body", "y", "loud"), [(DEPTHWISE, "[n, 5, 16]", "wd"), (NORM, "[n, 16, 4]", "gamma")]
)
def test_lowers_the_error_and_keeps_the_function(body: str, y: str, loud: str) -> None:
    model, ctx = graph(body, y, loud), context()
    before = error(model, ctx)
    same = SameFunction(next(iter(ctx.feeds)))
    same.start(model)
    (report,) = run(model, [EQUALIZE], ctx, [well_formed, same])
    assert report.changes == 1
    assert error(model, ctx) < before / 2


def test_leaves_alone_what_is_even() -> None:
    model, ctx = graph(DEPTHWISE, "[n, 5, 16]", ""), context()
    weights = model.tensors()["wp"].values.copy()
    run(model, [EQUALIZE], ctx)
    run(model, [EQUALIZE], ctx)
    (report,) = run(model, [EQUALIZE], ctx)
    assert report.changes == 0
    assert any("no factors" in why for _, why in report.skipped)
    assert model.tensors()["wp"].values.shape == weights.shape


def test_says_what_is_in_the_way() -> None:
    model, ctx = graph("s = Sigmoid(x) y = Conv(s, wp, bp)", "[n, 5, 16]", ""), context()
    (report,) = run(model, [Equalize()], ctx)
    assert report.changes == 0
    assert "Sigmoid" in report.skipped[0][1]


def test_symmetric_grids_and_few_bits() -> None:
    model, ctx = graph(DEPTHWISE, "[n, 5, 16]", "wd"), context()
    (report,) = run(model, parse("equalize(bits=4, target='tensorrt', shift=0.1)"), ctx)
    assert report.changes == 1


@pytest.mark.parametrize("options", [{"bits": 9}, {"target": "x"}])
def test_refuses_other_options(options: dict[str, Any]) -> None:
    with pytest.raises(IntqError, match="expected"):
        run(graph(DEPTHWISE, "[n, 5, 16]", ""), [Equalize(**options)], context())
