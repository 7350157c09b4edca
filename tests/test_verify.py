import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, metadata
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.transform import Context, IntqError, Pass, PassError
from onnx_intq.verify import (
    EPSILON,
    GROWTH,
    Drift,
    SameFunction,
    drift,
    random_feeds,
    small_feeds,
    well_formed,
)

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
TEXT = f"""{HEADER} g (float[4] x) => (float[4] y, int64[1] n) <float k = {{1}}> {{
    a = Mul(x, k)
    y = Neg(a)
    n = Shape(x)
}}"""
X = np.array([-1, 2, -3, 4], np.float32)


@dataclass(frozen=True, kw_only=True)
class Exact(Pass):
    """Claims to keep the function."""

    def run(self, model: gs.Graph, ctx: Context) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Inexact(Exact):
    """Claims nothing."""

    exact: ClassVar[bool] = False


def graph(text: str = TEXT) -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(text))


def scaled(factor: float) -> gs.Graph:
    model = graph()
    model.nodes[0].inputs[1].values = np.array(factor, np.float32)
    return model


def started(model: gs.Graph, **feeds: Any) -> SameFunction:
    same = SameFunction(feeds or {"x": X})
    same.start(model)
    return same


# Well formed


def test_a_valid_graph_passes() -> None:
    well_formed(Exact(), graph())


def broken(kind: str) -> gs.Graph:
    model = graph()
    mul, neg, _ = model.nodes
    if kind == "operator":
        neg.op = "Nope"
    elif kind == "attribute":
        neg.attrs["axis"] = 1
    elif kind == "inputs":
        mul.inputs.clear()
    elif kind == "type":
        model.outputs[0].dtype = np.dtype(np.int32)
    elif kind == "shape":
        model.outputs[0].shape = [5]
    elif kind == "producer":
        model.nodes.remove(mul)
    elif kind == "name":
        neg.inputs[0] = gs.Constant("x", X)
    else:
        model.outputs[0].dtype = None
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("operator", "No Op registered for Nope"),
        ("attribute", "Unrecognized attribute: axis"),
        ("inputs", "has input size 0 not in range"),
        ("type", "Inferred elem type differs from existing elem type"),
        ("shape", "Inferred shape and existing shape differ in dimension 0"),
        ("producer", "input 'a' of node"),
        ("name", "two tensors are named 'x'"),
        ("unknown type", "must include dtype"),
    ],
)
def test_a_broken_graph_is_stopped_in_one_line(kind: str, message: str) -> None:
    text = f"^left an invalid graph: .*{message}.*; this is a bug of test_verify$"
    with pytest.raises(PassError, match=text) as caught:
        well_formed(Exact(), broken(kind))
    assert "\n" not in str(caught.value)


def test_bodies_may_use_the_same_names() -> None:
    text = f"""{HEADER} g (float[3] x, bool q) => (float[3] y) {{
        y = If(q) <
            then_branch = yes () => (float[3] t) {{ u = Neg(x) t = Neg(u) }},
            else_branch = no () => (float[3] e) {{ u = Abs(x) e = Neg(u) }}
        >
    }}"""
    well_formed(Exact(), graph(text))


def test_weights_of_any_size_are_checked_by_their_shape() -> None:
    text = f"{HEADER} g (float[n, 3] x) => (float[n, 2000] y) {{ y = MatMul(x, w) }}"
    model = graph(text)
    model.nodes[0].inputs[1] = gs.Constant("w", np.ones((3, 2000), np.float32))
    well_formed(Exact(), model)
    model.nodes[0].inputs[1] = gs.Constant("w", np.ones((4, 2000), np.float32))
    with pytest.raises(PassError, match="left an invalid graph"):
        well_formed(Exact(), model)


# The same function


@pytest.mark.parametrize("factor", [1.0, 1 + GROWTH * EPSILON])
def test_rounding_is_allowed(factor: float) -> None:
    started(graph())(Exact(), scaled(factor))


def test_more_than_rounding_is_not() -> None:
    allowed = GROWTH * EPSILON * 3 * 4  # three nodes, largest output 4
    same = started(graph())
    same(Exact(), scaled(1 + 0.99 * allowed / 4))
    # Compared with the outputs before the pass, so what every pass may add does not pile up unseen.
    with pytest.raises(PassError, match=r"moved output 'y' by .* > .* although it is exact; this"):
        same(Exact(), scaled(1 + 2.1 * allowed / 4))


def test_outputs_that_vanish_or_change_their_shape_are_found() -> None:
    same, model = started(graph()), graph()
    model.outputs.pop()
    with pytest.raises(PassError, match="changed the outputs' names; this is a bug of test_verify"):
        same(Exact(), model)
    text = TEXT.replace("float[4] y", "float[1, 4] y").replace(
        "y = Neg(a)", "b = Neg(a) y = Unsqueeze(b, s)"
    )
    model = graph(text.replace("float k = {1}", "float k = {1}, int64[1] s = {0}"))
    with pytest.raises(PassError, match="moved output 'y' by inf"):
        same(Exact(), model)


def test_integers_booleans_and_texts_must_not_change() -> None:
    text = f"""{HEADER} g (float[4] x) => (int64[4] i, bool[4] b, string[2] s)
        <float zero = {{0}}> {{
        i = Cast<to = 7>(x)
        b = Greater(x, zero)
        s = Constant<value_strings = ["a", "b"]>()
    }}"""
    same = started(graph(text))
    same(Exact(), graph(text))
    for old, new, name in (
        ("to = 7>(x)", "to = 7>(y)", "i"),
        ("Greater", "Less", "b"),
        ('"a", ', '"c", ', "s"),
    ):
        changed = text.replace(old, new).replace("i = Cast", "y = Neg(x) i = Cast")
        with pytest.raises(PassError, match=f"moved output '{name}' by"):
            same(Exact(), graph(changed))


def test_values_that_are_not_finite_may_stay_so_but_not_appear() -> None:
    text = f"{HEADER} g (float[4] x) => (float[4] y) {{ a = Neg(x) b = Log(x) y = Add(a, b) }}"
    feeds = {"x": np.array([-1, 0, 1, np.inf], np.float32)}
    same = started(graph(text), **feeds)
    same(Exact(), graph(text))
    changed = text.replace("Add(a, b)", "Max(a, a)")
    with pytest.raises(PassError, match="moved output 'y' by inf"):
        same(Exact(), graph(changed))


def test_a_model_that_no_longer_runs_is_told() -> None:
    model = graph()
    model.nodes[1].op = "Nope"
    with pytest.raises(IntqError, match="onnxruntime cannot load it"):
        started(graph())(Exact(), model)


# Drift


def test_the_drift_of_an_inexact_pass_counts_from_the_untouched_model() -> None:
    same = started(graph())
    same(Inexact(), scaled(2))
    same(Exact(), scaled(2))
    assert same.drifts == {"test_verify": Drift(4.0, 0.0)}
    found = same.drift_of(scaled(1.1))
    assert found.largest == pytest.approx(0.4)
    assert found.sqnr == pytest.approx(20, abs=1e-5)


def test_models_of_integers_are_run_on_real_values() -> None:
    text = f"{HEADER} g (float[4] x) => (float[4] y) {{ y = Neg(x) }}"
    same = started(graph(text))
    integers = graph(text.replace("float", "int8"))
    grids = {"x": ["x", 0.5, 3], "y": ["y", 0.5, -3]}
    metadata(integers)[GRIDS_KEY] = json.dumps(grids)
    same(Inexact(), integers)
    assert same.drifts["test_verify"] == Drift(0.0, np.inf)
    assert small_feeds(integers)["x"].dtype == np.int8


def test_drift_is_over_all_floating_point_outputs() -> None:
    before = {"a": np.array([3.0, 0]), "b": np.array([[4.0]]), "n": np.array([1])}
    now = {"a": np.array([3.0, 1]), "b": np.array([[4.0]]), "n": np.array([9])}
    assert drift(before, now) == Drift(1.0, 10 * np.log10(25))
    assert drift(before, before) == Drift(0.0, np.inf)


def test_drift_of_silence_and_of_broken_outputs() -> None:
    zeros, ones = {"a": np.zeros(3)}, {"a": np.ones(3)}
    assert drift(zeros, ones) == Drift(1.0, -np.inf)
    assert drift(ones, {"a": np.array([1, np.nan, 1])}) == Drift(np.inf, -np.inf)
    assert drift(ones, {"a": np.ones(4)}) == Drift(np.inf, -np.inf)
    nan = {"a": np.array([2, np.nan, np.inf])}
    assert drift(nan, nan) == Drift(0.0, np.inf)


# Feeds


def inputs() -> gs.Graph:
    return graph(
        f"""{HEADER} g (float[b, 8, t] x, int64[b] length, int64[2, t] ids, float z)
            => (float[b, 8, t] y) {{ y = Relu(x) }}"""
    )


def test_small_feeds_are_one_short_sample() -> None:
    feeds = small_feeds(inputs(), frames=10)
    assert {name: values.shape for name, values in feeds.items()} == {
        "x": (1, 8, 10),
        "length": (1,),
        "ids": (2, 10),
        "z": (),
    }
    assert [feeds[name].dtype for name in ("x", "length", "ids")] == [
        np.float32,
        np.int64,
        np.int64,
    ]
    assert feeds["length"] == 10
    assert not feeds["ids"].any()


def test_random_feeds_are_normal_and_depend_on_the_seed_alone() -> None:
    shapes = {"x": (4, 8, 500), "length": (4,), "ids": (2, 5), "z": ()}
    one, again, other = (random_feeds(inputs(), shapes, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], again[name]) for name in shapes)
    assert not np.array_equal(one["x"], other["x"])
    # 16,000 values: three standard errors of mean and deviation.
    assert abs(one["x"].mean()) < 3 / np.sqrt(16_000)
    assert abs(one["x"].std() - 1) < 3 / np.sqrt(32_000)
    assert one["length"].tolist() == [500] * 4


def test_axes_named_like_a_first_one_are_batches() -> None:
    model = onnx.parser.parse_model(f"""{HEADER}
        g (float[batch, 4, time] x, float[2, batch, 3] h, float[n] v) => (float[] y) {{
            y = ReduceSum(x)
        }}""")
    shapes = {name: x.shape for name, x in small_feeds(graph_from_model(model), frames=7).items()}
    assert shapes == {"x": (1, 4, 7), "h": (2, 1, 3), "v": (1,)}
