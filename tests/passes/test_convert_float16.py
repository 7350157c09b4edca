from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx.reference import ReferenceEvaluator

from onnx_intq.engine import build
from onnx_intq.engine import parse as parse_by_library
from onnx_intq.feeds import read as read_speech
from onnx_intq.graph import constant, graph_from_model, model_from_graph, save
from onnx_intq.graph import load as read
from onnx_intq.models.export import export_named
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.samples import specs
from onnx_intq.source import recorded_frontend
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import drift, well_formed

ConvertFloat16: Any = load("convert_float16")
SPEECH = Path(__file__).parents[2] / "models" / "pretrained" / "digits" / "manifest.json"
PREPARE = "fold_constants, drop_identity, fold_bn, convert_float16"
HALF = float(np.finfo(np.float16).eps) / 2
"""Largest relative rounding error."""
TINY = float(np.finfo(np.float16).smallest_subnormal)
X = np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)


def graph(body: str, y: str = "float[n, 4, s] y", opset: int = 18, **values: Any) -> gs.Graph:
    """The nodes `body` make y of x; w is a weight, v a vector."""
    text = f"""<ir_version: 9, opset_import: ["" : {opset}, "own" : 1]>
        g (float[n, 4, t] x) => ({y}) {{ {body} }}"""
    model, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    for output in [] if "own." in body else model.graph.output:  # else inferred
        output.type.tensor_type.ClearField("shape")
    values = {"w": random.standard_normal((4, 4, 1)), "v": random.uniform(1, 2, 4)} | values
    for name, array in values.items():
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return graph_from_model(model)


def convert(model: gs.Graph, **options: Any) -> tuple[int, dict[str, str]]:
    """Convert; doing so again must change nothing. Changes; what stays float32, and why."""
    spec, ctx = ConvertFloat16(**options), Context()
    (first,) = run(model, [spec], ctx, [well_formed])
    before = model_from_graph(model).SerializeToString(deterministic=True)
    (second,) = run(model, [spec], ctx, [well_formed])
    assert second.changes == 0
    assert model_from_graph(model).SerializeToString(deterministic=True) == before
    assert {t.dtype.name for t in (*model.inputs, *model.outputs)} <= {"float32", "int64", "bool"}
    return first.changes, dict(first.skipped)


def types(model: gs.Graph) -> list[str]:
    """Every node and the type of its result, in order."""
    model_from_graph(model)  # sorts
    return [f"{node.op} {node.outputs[0].dtype.name}" for node in model.nodes]


def check_close(model: gs.Graph, before: onnx.ModelProto, roundings: int) -> None:
    """Rounded in float16 throughout, as onnx's evaluator does, outputs move by so many halves."""
    evaluators: Any = ReferenceEvaluator(before), ReferenceEvaluator(model_from_graph(model))
    expected, found = (each.run(None, {"x": X})[0] for each in evaluators)
    assert found.dtype == expected.dtype
    # Each rounding moves a result by HALF of the largest term; sums of 4 terms, factors up to 4.
    reach = 16 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=roundings * HALF * reach)


# It fires


def test_everything_between_input_and_output_becomes_float16() -> None:
    model = graph("a = Conv(x, w, v) b = Relu(a) y = Conv(b, w, v)")
    before = model_from_graph(model)
    assert convert(model) == (3, {})
    assert types(model) == [
        "Cast float16",
        "Conv float16",
        "Relu float16",
        "Conv float16",
        "Cast float32",
    ]
    assert [t.name for t in (*model.inputs, *model.outputs)] == ["x", "y"]
    constants = {id(t): t for n in model.nodes for t in n.inputs if isinstance(t, gs.Constant)}
    assert sorted(t.name for t in constants.values()) == ["v_float16", "w_float16"]
    assert {t.values.dtype.name for t in constants.values()} == {"float16"}
    check_close(model, before, 12)


def test_each_tensor_is_cast_once() -> None:
    model = graph("a = Conv(x, w) b = Exp(a) c = Log(a) d = Add(b, c) e = Add(x, a) y = Add(d, e)")
    changes, _ = convert(model)
    assert changes == 3
    casts = [node.inputs[0].name for node in model.nodes if node.op == "Cast"]
    assert sorted(casts) == ["a", "d", "x", "y_float32"]


def test_an_output_that_is_read_inside_keeps_its_name() -> None:
    model = graph("y = Conv(x, w) a = Conv(y, w) z = Exp(y)", "float y, float z")
    assert convert(model)[0] == 2
    assert [t.name for t in model.outputs] == ["y", "z"]
    readers = {node.op: node.inputs[0].name for node in model.outputs[0].outputs}
    assert readers == {"Exp": "y"}


def test_a_constant_that_both_types_read_is_there_in_both() -> None:
    model = graph("a = Conv(x, w, v) b = Pow(v, v) c = Reshape(b, s) y = Add(a, c)", s=[1, 4, 1])
    changes, why = convert(model)
    assert (changes, list(why)) == (2, ["Pow_1", "Reshape_2"])
    assert model.tensors()["v"].dtype == np.float32
    assert model.tensors()["v_float16"].dtype == np.float16


def test_a_default_of_an_input_can_still_be_replaced() -> None:
    model = graph("y = Conv(x, w)")
    model.inputs.append(model.tensors()["w"])
    convert(model)
    assert [t.name for t in model.inputs] == ["x", "w"]
    feeds = {"x": X, "w": np.zeros((4, 4, 1), np.float32)}
    found: Any = ReferenceEvaluator(model_from_graph(model)).run(None, feeds)
    assert not found[0].any()


@pytest.mark.parametrize("value", ["", "<value = float[1] {0.5}>"])
def test_types_in_attributes_are_converted(value: str) -> None:
    body = f"""s = Shape(x) a = ConstantOfShape{value}(s) b = Greater(x, a) c = Cast<to = 1>(b)
        d = Cast<to = 1>(a) e = Add(c, d) y = Add(e, x)"""
    model = graph(body)
    before = model_from_graph(model)
    assert convert(model) == (7, {})
    assert types(model)[-1] == "Cast float32"
    assert {t for t in types(model)[:-1] if t.endswith("32")} == set()
    check_close(model, before, 4)


def test_inputs_that_are_float32_by_definition_stay_so() -> None:
    sizes = np.array([1, 1, 2], np.float32)
    model = graph("a = Resize(x, , sizes) y = Relu(a)", sizes=sizes)
    assert convert(model) == (2, {})
    assert model.tensors()["sizes"].dtype == np.float32


def test_a_layer_normalization_keeps_its_float32_inside() -> None:
    body = "a = Transpose<perm = [0, 2, 1]>(x) b = LayerNormalization(a, v) y = Relu(b)"
    model = graph(body)
    before = model_from_graph(model)
    assert convert(model) == (3, {})
    assert model.nodes[2].attrs.get("stash_type", 1) == onnx.TensorProto.FLOAT
    check_close(model, before, 6)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, (4,), elements=st.floats(-65504, 65504, width=32)))
def test_a_constant_moves_by_at_most_half_a_step(values: np.ndarray) -> None:
    if values.any() and np.abs(values).max() < TINY:
        return
    model = graph("a = Conv(x, w, c) y = Relu(a)", c=values)
    convert(model)
    found = constant(model.nodes[1], 2)
    assert found is not None
    moved = np.abs(found.astype(np.float64) - values)
    assert (moved <= np.maximum(HALF * np.abs(values), TINY / 2)).all()


# It declines, with the reason

OVERFLOWS = "its sums or products can overflow"
AMPLIFIES = "it amplifies rounding errors or overflows"
COUNTS = "it counts; float16 holds no integer beyond 2048 exactly"
FOLLOWS = "it reads nothing but float32"
FIXED = "its domain or an attribute fixes its types"
STAY = {
    "c = LogSoftmax(a)": {"LogSoftmax_1": AMPLIFIES},
    "b = Softmax(a) c = Transpose(b)": {
        "Softmax_1": "it makes an output",
        "Transpose_2": FOLLOWS,
    },
    "b = ReduceMean(a) c = Sub(a, b)": {"ReduceMean_1": OVERFLOWS},
    "b = Mul(a, a) e = ReduceMean(b) f = Add(e, k) g = Sqrt(f) c = Div(a, g)": {
        "Mul_1": "squares can overflow",
        "ReduceMean_2": OVERFLOWS,
        "Add_3": FOLLOWS,
        "Sqrt_4": AMPLIFIES,
    },
    "s = Shape(a) b = Cast<to = 1>(s) e = Mul(b, k) f = Cast<to = 7>(e) c = Expand(a, f)": {
        "Cast_2": COUNTS,
        "Mul_3": FOLLOWS,
        "Cast_4": FOLLOWS,
    },
    "c = BatchNormalization(a, v, v, v, v)": {
        "BatchNormalization_1": "its statistics need float32; run fold_bn first"
    },
    "b = own.Odd(a) c = Conv(b, w)": {
        "own_Odd": FIXED,
        "Conv_2": "a type of its tensors is not known",
    },
    "b = RandomNormalLike<dtype = 1>(a) c = Add(a, b)": {"RandomNormalLike_1": FIXED},
    "b, e, f = DynamicQuantizeLinear(a) c = Add(a, e)": {
        "DynamicQuantizeLinear_1": "ONNX has it in float32 only"
    },
}


@pytest.mark.parametrize("body", STAY)
def test_stays_float32(body: str) -> None:
    result = "[y_of] y = Identity(c)"
    model = graph(f"a = Conv(x, w) {body} {result}", k=np.float32(0.5))
    for node in model.nodes:
        node.name = "own_Odd" if node.op == "Odd" else node.name
    _, why = convert(model)
    why.pop("y_of", None)  # renames a result
    assert why == STAY[body]
    for node in model.nodes:
        if node.name in why:
            assert "float16" not in {t.dtype.name for t in (*node.inputs, *node.outputs) if t.dtype}


def test_a_softmax_inside_becomes_float16() -> None:
    assert convert(graph("a = Softmax(x) y = Conv(a, w)")) == (2, {})


def test_a_sparse_constant_is_left() -> None:
    model = graph("a = Relu(x) y = Add(a, x)")
    result = gs.Variable("c", np.dtype(np.float32), (1,))
    model.nodes.append(gs.Node("Constant", "c", {"value_floats": [1.0]}, [], [result]))
    model.nodes[1].inputs[1] = result
    assert convert(model) == (2, {"c": FIXED})


def test_nodes_are_kept_by_name() -> None:
    model = graph("[one] a = Conv(x, w) [two] b = Conv(a, w) [act] y = Relu(b)")
    changes, why = convert(model, keep=("t*",))
    assert (changes, why) == (1, {"two": "kept float32 by request", "act": FOLLOWS})
    assert types(model) == [
        "Cast float16",
        "Conv float16",
        "Cast float32",
        "Conv float32",
        "Relu float32",
    ]


def test_what_is_float16_already_is_left() -> None:
    model = graph("[half] a = Cast<to = 10>(x) b = Relu(a) y = Cast<to = 1>(b)")
    assert convert(model) == (0, {"half": "float16 already; the model is left as it is"})


BRANCH = "() => (float[n, 4, t] z) { z = Relu(x) }"
REFUSED = {
    "a = Relu(x) q = QuantizeLinear(a, k, i) y = DequantizeLinear(q, k, i)": (
        "QuantizeLinear 'QuantizeLinear_1' is quantized: its precision is its own; expected a float"
    ),
    f"y = If(c) <then_branch = a {BRANCH}, else_branch = b {BRANCH}>": "If 'If_0' has a body; ",
    "a = Cast<to = 11>(x) b = Relu(a) y = Cast<to = 1>(b)": "is double; expected a float32 model",
    "y = Add(x, big)": r"constant 'big' of Add 'Add_0' reaches 70000; .* keep=\('Add_0',\)",
    "y = Add(x, small)": r"constant 'small' of Add 'Add_0' reaches 1e-09; expected values that fl",
    "s = Shape(x) a = ConstantOfShape<value = float[1] {1e9}>(s) y = Add(x, a)": "reaches 1e\\+09",
}


@pytest.mark.parametrize("body", REFUSED)
def test_refuses(body: str) -> None:
    given: Any = {"k": np.float32(0.1), "i": np.int8(0), "c": np.array(True)}
    model = graph(body, big=7e4, small=1e-9, **given)
    with pytest.raises(PassError, match=REFUSED[body]) as caught:
        convert(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-np.inf, 65504.0, 65519.0, 0.0, 6e-8])
def test_values_that_float16_holds_are_taken(value: float) -> None:
    model = graph("y = Max(x, c)", c=value)
    assert convert(model) == (1, {})


# The embedded model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded model with masks, float32 and float16."""
    folder = tmp_path_factory.mktemp("digits")
    export_named("digits", folder / "float.onnx", lengths=True)
    model = read(folder / "float.onnx")
    report = run(model, parse(PREPARE), Context(), [well_formed])[-1]
    assert report.skipped == (("/decoder/LogSoftmax", AMPLIFIES),)
    save(model, folder / "half.onnx")
    return folder / "float.onnx", folder / "half.onnx"


@pytest.mark.slow
def test_digits_are_as_close_as_roundings_are(digits: tuple[Path, Path]) -> None:
    whole, half = digits
    frontend, inputs = recorded_frontend(read(whole)), specs(read(whole))
    (batch, *_) = read_speech(SPEECH, frontend=frontend, inputs=inputs, limit=1)
    first, second = (Session(path, threads=1).run(batch) for path in digits)
    # A rounding is an error of at most 2^-11, uniform: -20*log10(2^-11 / sqrt(3)) = 71 dB. Weights
    # and results of 26 convolutions and the 4 sums are rounded: 56 in a row, if none is damped.
    bound = -20 * np.log10(HALF / np.sqrt(3)) - 10 * np.log10(56)
    assert bound == pytest.approx(53.5, abs=0.1)
    assert drift(first, second).sqnr > bound
    assert half.stat().st_size < 0.55 * whole.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)
def test_an_engine_of_digits_computes_in_half(digits: tuple[Path, Path]) -> None:
    found = build(digits[1], compute_capability="8.6")
    assert found.count("conv", "half") == found.count("conv") == 26
    assert parse_by_library(digits[1], compute_capability="7.5").refusals == ()
