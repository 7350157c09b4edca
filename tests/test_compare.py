"""Float, QDQ and integer-only forms of one model, compared; layers spoilt on purpose are found."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.compare import _Stream, compare, inputs, random_feeds
from onnx_intq.comparison import Comparison, Row
from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model, metadata, model_from_graph
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

Array = npt.NDArray[Any]

HEADER = '<ir_version: 10, opset_import: ["" : 21]> net '
WEIGHTS = {"w1": 0.010417, "w2": 0.019373}
"""Name of a weight, and its scale."""
GRIDS = {"x": (0.050143, 120), "r": (0.041549, 0), "y": (0.093719, 130)}
"""Tensor, scale and zero point, all uint8; no ratio of scales makes ties likely."""
SHIFT = 40


def integers() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(-60, 61, (3, 3, 3), dtype=np.int8) for name in WEIGHTS}


def graph(text: str, weights: dict[str, Array] | None = None) -> gs.Graph:
    model = onnx.parser.parse_model(HEADER + text)
    for name, values in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return graph_from_model(model)


def float_model(weights: dict[str, Array] | None = None) -> gs.Graph:
    text = """(float[n,3,t] x) => (float[n,3,u] y) {
        a = Conv(x, w1)   r = Relu(a)   y = Conv(r, w2)
    }"""
    stored = weights or integers()
    return graph(text, {n: (stored[n] * WEIGHTS[n]).astype(np.float32) for n in WEIGHTS})


def constants() -> str:
    grids = [f"float {n}_s = {{{s}}}, uint8 {n}_z = {{{z}}}" for n, (s, z) in GRIDS.items()]
    return ", ".join([*grids, *(f"float {n}_s = {{{s}}}" for n, s in WEIGHTS.items())])


def qdq_model(weights: dict[str, Array] | None = None) -> gs.Graph:
    text = f"""(float[n,3,t] x) => (float[n,3,u] y) <{constants()}> {{
        x_q = QuantizeLinear(x, x_s, x_z)   x_d = DequantizeLinear(x_q, x_s, x_z)
        w1_d = DequantizeLinear(w1, w1_s)
        a = Conv(x_d, w1_d)   r = Relu(a)
        r_q = QuantizeLinear(r, r_s, r_z)   r_d = DequantizeLinear(r_q, r_s, r_z)
        w2_d = DequantizeLinear(w2, w2_s)
        b = Conv(r_d, w2_d)
        y_q = QuantizeLinear(b, y_s, y_z)   y = DequantizeLinear(y_q, y_s, y_z)
    }}"""
    return graph(text, weights or integers())


def requantize(source: str, target: str, name: str) -> str:
    """Nodes: clip((acc * factor + half) // 2^SHIFT + zero point), floored below zero as well."""
    weight = {"r": "w1", "y": "w2"}[target]
    zero = GRIDS[target][1]
    factor = round(GRIDS[source][0] * WEIGHTS[weight] / GRIDS[target][0] * 2**SHIFT)
    offset = 2 ** (SHIFT - 1) + (1 << 14 << SHIFT)  # keeps the dividend positive
    return f"""
        {name}_wide = Cast<to = 7>({name})
        {name}_f = Constant<value = int64 {{{factor}}}>()   {name}_m = Mul({name}_wide, {name}_f)
        {name}_o = Constant<value = int64 {{{offset}}}>()   {name}_p = Add({name}_m, {name}_o)
        {name}_t = Constant<value = int64 {{{2**SHIFT}}}>() {name}_v = Div({name}_p, {name}_t)
        {name}_b = Constant<value = int64 {{{(1 << 14) - zero}}}>()
        {name}_c = Sub({name}_v, {name}_b)
        {name}_l = Clip({name}_c, low, high)   {target}_q = Cast<to = 2>({name}_l)"""


def integer_model(weights: dict[str, Array] | None = None) -> gs.Graph:
    text = f"""(float[n,3,t] x) => (float[n,3,u] y)
        <{constants()}, int64 low = {{0}}, int64 high = {{255}}> {{
        x_q = QuantizeLinear(x, x_s, x_z)
        a = ConvInteger(x_q, w1, x_z) {requantize("x", "r", "a")}
        b = ConvInteger(r_q, w2, r_z) {requantize("r", "y", "b")}
        y = DequantizeLinear(y_q, y_s, y_z)
    }}"""
    found = graph(text, weights or integers())
    metadata(found)[GRIDS_KEY] = json.dumps({f"{n}_q": [n, s, z] for n, (s, z) in GRIDS.items()})
    return found


MODELS = {"float": float_model, "QDQ": qdq_model, "integer": integer_model}


def feeds(count: int = 1, length: int = 400) -> list[Batch]:
    rng = np.random.default_rng(1)
    return [{"x": rng.uniform(-4, 4, (2, 3, length)).astype(np.float32)} for _ in range(count)]


def rows(found: Comparison) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_equals_itself(kind: str) -> None:
    found = compare(MODELS[kind](), MODELS[kind](), feeds(), threads=1)
    assert found.kinds == (kind, kind)
    assert all(not row.free.noise and not row.forced.noise for row in found.rows)
    assert all(row.free.elements == row.forced.elements > 0 for row in found.rows)
    assert found.free_entry is None


@pytest.mark.parametrize("a", MODELS)
@pytest.mark.parametrize("b", MODELS)
def test_any_two_compare(a: str, b: str) -> None:
    found = compare(MODELS[a](), MODELS[b](), feeds(2), threads=1)
    assert (found.kinds, found.batches, found.left_out) == ((a, b), 2, ())
    expected = {"QDQ": ["x", "r", "y"], "integer": ["x", "r", "y"]}
    if a == "float":
        expected["float"] = ["a", "r", "y"]
    assert [row.name for row in found.rows] == expected.get(b, ["r", "y"])
    assert [row.name for row in found.outputs] == ["y"]
    for row in found.rows:
        assert row.same_grid == (a != "float" and b != "float")
        assert row.free.sqnr > 25
        assert row.forced.sqnr > 30
    assert found.rows[-1].inputs == (len(found.rows) - 2,)


def test_teacher_forced_integers_are_those_of_qdq() -> None:
    found = compare(qdq_model(), integer_model(), feeds(4), threads=1)
    assert found.differing_per_million(lambda row: row.forced) == 0
    assert sum(row.forced.elements for row in found.rows) > 25_000


def test_layers_are_named_by_what_the_float_model_computes() -> None:
    found = rows(compare(float_model(), integer_model(), feeds(), threads=1))
    assert {n: r.operators for n, r in found.items()} == {
        "x": ("QuantizeLinear",),
        "r": ("Conv", "Relu"),
        "y": ("Conv",),
    }
    assert any(name.startswith("ConvInteger") for name in found["r"].nodes)
    found = rows(compare(integer_model(), integer_model(), feeds(), threads=1))
    assert "ConvInteger" in found["r"].operators


def test_free_running_errors_are_those_of_the_whole_models() -> None:
    batch = feeds()[0]
    a, b = float_model(), qdq_model()
    row = rows(compare(a, b, [batch], threads=1))["y"]
    whole = [run(net, batch) for net in (a, b)]
    error = whole[1].astype(np.float64) - whole[0]
    assert row.free.largest == pytest.approx(np.abs(error).max(), rel=1e-5)
    signal = np.square(whole[0].astype(np.float64)).sum()
    assert row.free.sqnr == pytest.approx(10 * np.log10(signal / np.square(error).sum()), abs=1e-3)
    assert row.free.half_steps == np.count_nonzero(np.abs(error) >= GRIDS["y"][0] / 2)


def run(net: gs.Graph, batch: Batch) -> Array:
    values: Array = Session(model_from_graph(net), threads=1).run(batch)["y"]
    return values


def test_a_teacher_forced_layer_reads_the_values_of_a_on_the_grid_of_b() -> None:
    batch = feeds()[0]
    row = rows(compare(float_model(), qdq_model(), [batch], threads=1))["y"]
    weights = {n: (q * np.float32(WEIGHTS[n])).astype(np.float64) for n, q in integers().items()}
    r = np.maximum(convolve(batch["x"].astype(np.float64), weights["w1"]), 0)
    step, zero = GRIDS["r"]
    forced = (np.clip(np.rint(r / step) + zero, 0, 255) - zero) * step
    step, zero = GRIDS["y"]
    made = np.clip(np.rint(convolve(forced, weights["w2"]) / step) + zero, 0, 255) - zero
    error = made * step - convolve(r, weights["w2"])
    assert row.forced.noise == pytest.approx(np.square(error).sum(), rel=1e-2)
    assert row.forced.largest == pytest.approx(np.abs(error).max(), rel=1e-2)


def convolve(x: Array, w: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2], axis=2)
    result: Array = np.einsum("nctk,ock->not", windows, w)
    return result


@pytest.mark.parametrize("a", MODELS)
@pytest.mark.parametrize("b", MODELS)
@pytest.mark.parametrize(("weight", "tensor"), [("w1", "r"), ("w2", "y")])
def test_a_spoilt_layer_is_where_the_error_enters(a: str, b: str, weight: str, tensor: str) -> None:
    weights = integers()
    weights[weight][1] = -weights[weight][1]
    found = compare(MODELS[a](), MODELS[b](weights), feeds(), threads=1)
    forced, free = found.forced_entry, found.free_entry
    assert forced is not None
    assert free is not None
    assert forced is free
    # Where both are float, the convolution and its activation are two tensors.
    assert forced.name == ("a" if (a, b, tensor) == ("float", "float", "r") else tensor)
    if a == b:
        assert [row.name for row in found.rows if row.forced.noise] == [
            row.name for row in found.rows if row.name in {"a", tensor} and row is forced
        ]
        assert found.first_difference is forced


def test_the_result_does_not_depend_on_how_layers_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compare(float_model(), qdq_model(), feeds(2), threads=1)
    monkeypatch.setattr("onnx_intq.compare.SIZE", 1)
    assert compare(float_model(), qdq_model(), feeds(2), threads=1) == whole


def test_few_tensors_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(_Stream):
        def __getitem__(self, name: str) -> Array:
            values = super().__getitem__(name)
            held.append(len(self._held))
            return values

    monkeypatch.setattr("onnx_intq.compare.SIZE", 4)
    monkeypatch.setattr("onnx_intq.compare._Stream", Watched)
    nodes = [f"t{n + 1} = Neg(t{n})" for n in range(100)]
    net = graph(f"(float[2] t0) => (float[2] t100) {{ {' '.join(nodes)} }}")
    found = compare(net, net, [{"t0": np.ones(2, np.float32)}], threads=1)
    assert len(found.rows) == 100
    assert max(held) <= 6  # a group, what it reads, and the next


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    compare(
        float_model(),
        float_model(),
        feeds(2),
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]


MANY = """(float[4] x, int64[1] length) => (float[4] y, int64[1] n)
    <float s = {0.1}, float t = {0.2}, uint8 z = {9}> {
        f = Abs(x)
        q = QuantizeLinear(f, s, z)   d = DequantizeLinear(q, s, z)
        p = QuantizeLinear(f, s, z)   e = DequantizeLinear(p, s, z)
        o = QuantizeLinear(f, t, z)   g = DequantizeLinear(o, t, z)
        u = Add(d, e)   v = Add(g, u)   y = Mul(v, f)
        n = Abs(length)
    }"""


def test_a_tensor_on_several_grids_has_a_row_for_each() -> None:
    text = "(float[4] x, int64[1] length) => (float[4] y, int64[1] n) "
    net = graph(text + "{ f = Abs(x) u = Add(f, f) v = Add(f, u) y = Mul(v, f) n = Abs(length) }")
    batch = {"x": np.array([-1, 2, 3.33, 4], np.float32), "length": np.array([-4])}
    found = compare(net, graph(MANY), [batch], threads=1)
    assert [(row.name, row.tensor, row.scale) for row in found.rows] == [
        ("f", "f", None),
        ("f", "q", pytest.approx(0.1)),
        ("f", "o", pytest.approx(0.2)),
        ("u", "u", None),
        ("v", "v", None),
        ("y", "y", None),
        ("n", "n", 1.0),
    ]
    by_tensor = {row.tensor: row for row in found.rows}
    # Both copies of q are forced, f is in float where y reads it.
    assert by_tensor["u"].inputs == (1,)
    assert by_tensor["y"].inputs == (0, 4)
    assert not by_tensor["y"].forced.noise
    assert by_tensor["n"].free.elements == 1
    assert not by_tensor["n"].free.differing


def test_a_model_that_takes_and_gives_integers_compares() -> None:
    text = f"""(uint8[n,3,t] x) => (uint8[n,3,u] y_q)
        <{constants()}, int64 low = {{0}}, int64 high = {{255}}> {{
        a = ConvInteger(x, w1, x_z) {requantize("x", "r", "a")}
        b = ConvInteger(r_q, w2, r_z) {requantize("r", "y", "b")}
    }}"""
    net = graph(text, integers())
    grids = {"x" if n == "x" else f"{n}_q": [n, s, z] for n, (s, z) in GRIDS.items()}
    metadata(net)[GRIDS_KEY] = json.dumps(grids)
    found = compare(integer_model(), net, feeds(), threads=1)
    assert [row.name for row in found.rows] == ["r", "y"]
    assert found.free_entry is None
    assert [row.output for row in found.rows] == [False, True]
    assert compare(net, float_model(), feeds(), threads=1).rows[-1].forced.sqnr > 25


def test_names_with_other_shapes_are_left_out_and_said_so() -> None:
    a = graph("(float[2,3] x) => (float[2,3] y) { t = Transpose(x) u = Transpose(t) y = Neg(u) }")
    b = graph("(float[2,3] x) => (float[2,3] y) { t = Abs(x) u = Neg(t) y = Neg(u) }")
    found = compare(a, b, [{"x": -np.ones((2, 3), np.float32)}], threads=1)
    assert found.left_out == (("t", "has shape [3, 2] in A, [2, 3] in B"),)
    assert [row.name for row in found.rows] == ["u", "y"]


def test_inputs_that_nothing_shares_are_fed_as_they_are() -> None:
    text = "(float[n] x, bool take) => (float[n] y) { "
    a = graph(text + "m = Where(take, x, x) y = Exp(m) }")
    b = graph(text + "k = Not(take) j = Where(k, x, x) y = Exp(j) }")
    batch = {"x": np.ones(3, np.float32), "take": np.array(True)}
    found = compare(a, b, [batch], threads=1)
    assert [row.name for row in found.rows] == ["y"]
    assert found.free_entry is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("(float[n,2,t] x) => (float[n,2,t] y) { y = Neg(x) }", "expected the same inputs"),
        ("(float[n,3,t] z) => (float[n,3,t] y) { y = Neg(z) }", "expected the same inputs"),
        ("(double[n,3,t] x) => (double[n,3,t] y) { y = Neg(x) }", "expected the same inputs"),
        ("(float[n,3,t] x) => (float[n,3,t] q) { p = Neg(x) q = Neg(p) }", "no tensor in common"),
        ("(float[n,3,t] x) => (float[n,3,t] r) { p = Neg(x) r = Log(p) }", "NaN in tensor 'r'"),
    ],
)
def test_what_cannot_be_compared_is_refused(text: str, what: str) -> None:
    net = graph(text)
    batch = {"x": np.ones((2, 3, 9), np.float32)}
    shrunk = graph("(float[n,3,t] x) => (float[n,3,t] r) { r = Abs(x) }")
    with pytest.raises(IntqError, match=what):
        compare(shrunk if "Log" in text else float_model(), net, [batch], threads=1)


def test_feeds_are_checked() -> None:
    with pytest.raises(IntqError, match="holds no batch"):
        compare(float_model(), qdq_model(), [])
    with pytest.raises(IntqError, match="lack input 'x'"):
        compare(float_model(), qdq_model(), [{}])
    with pytest.raises(IntqError, match="float64"):
        compare(float_model(), qdq_model(), [*feeds(), {"x": np.ones((1, 3, 9))}], threads=1)


def test_random_feeds_fit_the_inputs() -> None:
    found = inputs(float_model(), integer_model())
    batch = random_feeds(found)
    assert batch["x"].shape == (1, 3, 256)
    assert batch["x"].dtype == np.float32
    assert compare(float_model(), integer_model(), [batch], threads=1).rows
