import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.kernels.division import reciprocal
from onnx_intq.kernels.erf import erf, gelu
from onnx_intq.kernels.exponential import exp
from onnx_intq.kernels.sigmoid import sigmoid, swish, tanh
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import well_formed

IntegerizeNonlinear: Any = load("integerize_nonlinear")
law = settings(max_examples=60, deadline=None)
MODES = st.sampled_from(["poly", "paper"])
SWISH = "s = Sigmoid(a) c = Mul(a, s)"
OTHER_SWISH = "s = Sigmoid(a) c = Mul(s, a)"
Kernel = Callable[[Any, float, Any], tuple[Any, float]]
KERNELS: dict[str, Kernel] = {
    "c = Sigmoid(a)": sigmoid,
    "c = Tanh(a)": tanh,
    "c = Erf(a)": erf,
    "c = Gelu(a)": gelu,
    'c = Gelu<approximate = "tanh">(a)': gelu,
    SWISH: swish,
    OTHER_SWISH: swish,
    "c = Reciprocal(a)": lambda q, scale, _: reciprocal(q, scale),
    "c = Pow(a, two)": lambda q, scale, _: (q * q, scale**2),
}


def sigmoid_of(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gelu_of(x: Any) -> Any:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@st.composite
def grids(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(sorted(GRIDS))) -> Any:
    """Type, scale, zero point: full scale is 0.5 to 50 in real units."""
    dtype = draw(st.sampled_from(dtypes))
    grid = GRIDS[dtype]
    scale = 2.0 ** draw(st.floats(-1, 5.7)) / (grid.high - grid.low)
    return dtype, float(np.float32(scale)), draw(st.integers(grid.low, grid.high))


@law
@given(st.sampled_from(sorted(KERNELS)), grids(), grids(), MODES)
def test_every_integer_is_that_of_the_kernel(
    place: Any, body: str, x: Any, y: Any, mode: Any
) -> None:
    model = place.graph(body, y, x, two=np.float32(2))
    if (why := place.lower(IntegerizeNonlinear(mode=mode), model)) != []:
        far = {"c = Reciprocal(a)": "a requantisation by", "c = Pow(a, two)": "a requantisation by"}
        assert why[0].startswith(far.get(body, "an e"))  # "an exponential of steps of", "an erf of"
        return
    q = place.integers(x[0], (600, 6))
    values, scale = KERNELS[body](q.astype(np.int64) - x[2], x[1], mode)
    ends = GRIDS[x[0]].low - x[2], GRIDS[x[0]].high - x[2]
    reach = max(end**2 for end in ends) if "Pow" in body else 0  # 32 bits: the multiplier has 30
    expected = place.requantized(values, scale, y, reach)
    np.testing.assert_array_equal(place.outputs(model, q), expected)


@law
@given(grids(), grids(), MODES)
def test_exp_is_shifted_by_the_constant_upper_end(place: Any, x: Any, y: Any, mode: Any) -> None:
    """The kernel takes no positive input; what lies above the result's grid saturates."""
    model = place.graph("c = Exp(a)", y, x)
    if place.lower(IntegerizeNonlinear(mode=mode), model) != []:
        assert mode == "paper"
        return
    q = place.integers(x[0], (600, 6)).astype(np.int64)
    ceiling = math.log(max(place.reals(GRIDS[y[0]].high, y), y[1]))
    top = min(GRIDS[x[0]].high - x[2], math.ceil(ceiling / x[1]))
    values, scale = exp(q - x[2] - top, x[1], mode)
    expected = place.requantized(values, scale * math.exp(top * x[1]), y)
    np.testing.assert_array_equal(place.outputs(model, q.astype(x[0])), expected)


ERRORS: list[tuple[str, Any, Callable[[Any], Any]]] = [
    ("c = Sigmoid(a)", sigmoid_of, lambda x: 6e-4),
    ("c = Tanh(a)", np.tanh, lambda x: 1.2e-3),
    ("c = Exp(a)", np.exp, lambda x: 1.3e-3 * np.exp(x.max())),
    ("c = Erf(a)", np.vectorize(math.erf), lambda x: 4.8e-3),
    ("c = Gelu(a)", gelu_of, lambda x: 4.1e-3),
    (SWISH, lambda x: x * sigmoid_of(x), lambda x: 6e-4 * np.abs(x)),
]
"""The kernels' documented errors in mode poly, in real units."""


@pytest.mark.parametrize(("body", "function", "error"), ERRORS)
@pytest.mark.parametrize("x", [("int8", 6 / 128, -5), ("uint16", 12 / 65535, 33000)])
@pytest.mark.parametrize("y", [("uint8", 8 / 255, 30), ("int16", 8 / 65535, -100)])
def test_is_as_near_to_the_float_function_as_the_kernel(
    place: Any, body: str, function: Any, error: Any, x: Any, y: Any
) -> None:
    model = place.graph(body, y, x)
    assert place.lower(IntegerizeNonlinear(), model) == []
    q = place.integers(x[0], (600, 6))
    real = place.reals(q, x)
    off = place.reals(place.outputs(model, q), y) - place.saturated(function(real), y)
    assert (np.abs(off) <= error(real) + y[1] / 2 * (1 + 1e-6)).all()


SELU = 1.6732631921768188, 1.0507010221481323
REAL: dict[str, Callable[[Any], Any]] = {
    "c = Sigmoid(a)": sigmoid_of,
    "c = Tanh(a)": np.tanh,
    "c = Exp(a)": np.exp,
    "c = Erf(a)": np.vectorize(math.erf),
    "c = Gelu(a)": gelu_of,
    SWISH: lambda x: x * sigmoid_of(x),
    "c = HardSigmoid<alpha = 0.5>(a)": lambda x: np.clip(x / 2 + 0.5, 0, 1),
    "c = HardSwish(a)": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "c = Mish(a)": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "c = Softplus(a)": lambda x: np.logaddexp(0, x),
    "c = Softsign(a)": lambda x: x / (1 + np.abs(x)),
    "c = Elu<alpha = 2.0>(a)": lambda x: np.where(x < 0, 2 * np.expm1(x), x),
    "c = Selu(a)": lambda x: SELU[1] * np.where(x < 0, SELU[0] * np.expm1(x), x),
    "c = Sqrt(a)": lambda x: np.sqrt(np.maximum(x, 0)),
    "c = Log(a)": lambda x: np.log(np.maximum(x, 0)),
    "c = Reciprocal(a)": lambda x: 1 / x,
    "c = Pow(a, two)": np.square,
    "c = Pow(two, a)": np.exp2,
    "c = Sin(a)": np.sin,
    "c = Atan(a)": np.arctan,
    "c = Floor(a)": np.floor,
}
"""In NumPy, so that not only one definition of a function is tested."""


@law
@given(st.sampled_from(sorted(REAL)), grids(), grids())
def test_tables_are_the_rounded_function(place: Any, body: str, x: Any, y: Any) -> None:
    """Any function, any widths; values that the input's grid has by rounding alone saturate."""
    model = place.graph(body, y, x, two=np.float32(2))
    assert place.lower(IntegerizeNonlinear(mode="lut"), model) == []
    assert [node.op for node in model.nodes] == ["Cast", "Gather"]
    q = place.integers(x[0], (600, 6))
    with np.errstate(all="ignore"):
        steps = np.clip(REAL[body](place.reals(q, x)) / y[1], -(2**20), 2**20)
    grid = GRIDS[y[0]]
    expected = np.clip(np.rint(steps) + y[2], grid.low, grid.high)
    # Attributes such as HardSwish's 1/6 are float32: near half a step, either neighbour is right.
    doubt = 2e-3 + np.abs(steps) * 2.0**-21
    half = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < doubt
    off = np.abs(place.outputs(model, q) - expected)
    assert (off <= half).all()


@pytest.mark.parametrize("op", ["HardSwish", "Mish", "Softplus", "Elu", "Sqrt", "Log"])
@pytest.mark.parametrize("mode", ["poly", "paper"])
def test_what_has_no_kernel_takes_a_table_in_any_mode(place: Any, op: str, mode: str) -> None:
    x, y = ("int8", 0.05, -128), ("uint8", 0.03, 60)
    model, tabled = (place.graph(f"c = {op}(a)", y, x) for _ in range(2))
    assert place.lower(IntegerizeNonlinear(mode=mode), model) == []
    assert place.lower(IntegerizeNonlinear(mode="lut"), tabled) == []
    q = place.integers("int8", (43, 6))
    np.testing.assert_array_equal(place.outputs(model, q), place.outputs(tabled, q))


def test_an_activation_behind_a_function_is_its_limit(place: Any) -> None:
    x, y = ("int8", 0.05, 3), ("int8", 0.01, -20)
    q = place.integers("int8", (43, 6))
    for mode in ("poly", "lut"):
        model, alone = (
            place.graph("r = Tanh(a) c = Relu(r)", y, x),
            place.graph("c = Tanh(a)", y, x),
        )
        for graph in (model, alone):
            assert place.lower(IntegerizeNonlinear(mode=mode), graph) == []
        expected = np.maximum(place.outputs(alone, q), -20)
        np.testing.assert_array_equal(place.outputs(model, q), expected)


def test_swish_with_a_factor_of_its_own(place: Any) -> None:
    """Opset 24's operator, in a graph that has it already."""
    x, y = ("int8", 0.05, 3), ("int8", 0.05, -20)
    q = place.integers("int8", (43, 6))
    for alpha, mode in ((1.702, "poly"), (-1.0, "poly"), (1.702, "lut")):
        model = place.graph("c = Sigmoid(a)", y, x)
        (node,) = [n for n in model.nodes if n.op == "Sigmoid"]
        node.op, node.attrs, model.opset = "Swish", {"alpha": alpha}, 24
        assert IntegerizeNonlinear(mode=mode).run(model, Context()) == 1
        real = place.reals(q, x)
        found = place.reals(place.outputs(model, q), y)
        expected = place.saturated(real * sigmoid_of(alpha * real), y)
        assert np.abs(found - expected).max() <= 0.025 + 6e-4 * 6.55


def test_a_sigmoid_that_others_read_is_no_part_of_a_swish(place: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) {
        s = Sigmoid(x) p = Mul(x, s) y = Add(p, s) }"""
    model = graph_from_model(onnx.parser.parse_model(text))
    ranges = {"x": (-4.0, 4.0), "y": (-1.0, 5.0), "p": (-0.3, 4.0)}
    ctx = Context(facts={"quantized"}, ranges=ranges)
    passes = "complete_qdq, integerize_nonlinear, integerize_mul, integerize_add"
    run(model, parse(passes), ctx, [well_formed])
    assert ctx.remaining == []
    x = np.linspace(-4, 4, 400, dtype=np.float32).reshape(100, 4)
    assert prove(model) == []
    found = next(iter(Session(model_from_graph(model), threads=1).run({"x": x}).values()))
    # 16 bits on the way: the sigmoid's error twice, its own and times x, dominates.
    assert np.abs(found - (x + 1) * sigmoid_of(x)).max() <= 5 * 6e-4 + 3 * 8 / 65535


CHAINS = {
    "swish": "c = Conv(x, w) s = Sigmoid(c) p = Mul(c, s) y = Conv(p, w)",
    "glu": "c = Conv(x, w) a, b = Split<axis = 1, num_outputs = 2>(c) s = Sigmoid(b) y = Mul(a, s)",
}


@pytest.mark.parametrize("mode", ["poly", "lut"])
@pytest.mark.parametrize("chain", CHAINS)
def test_gates_of_a_calibrated_model(chain: str, mode: str) -> None:
    """Between Sigmoid and Mul of a swish there is no grid; GLU's gate has 16 bits."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 4, t] x) => (float[1, m, t] y) {{ {CHAINS[chain]} }}"""
    float_model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    w = random.standard_normal((4, 4, 1)).astype(np.float32)
    float_model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    x = random.uniform(-1, 1, (1, 4, 500)).astype(np.float32)
    model, ctx = graph_from_model(float_model), Context(facts={"bn-folded", "calibrated"})
    ctx.ranges = {"x": (-1.0, 1.0), "c": (-6.0, 6.0), "p": (-0.3, 6.0), "y": (-6.0, 6.0)}
    run(model, parse("insert_qdq, complete_qdq, quantize_weights"), ctx, [well_formed])
    (gate,) = [n for n in model.nodes if n.op == "Sigmoid"]
    (reader,) = gate.outputs[0].outputs
    assert reader.op == ("Mul" if chain == "swish" else "QuantizeLinear")
    if chain == "glu":
        assert reader.outputs[0].dtype == np.int16
    both = [model_from_graph(model)]
    lower = f"integerize_conv, integerize_move, integerize_mul, integerize_nonlinear(mode={mode!r})"
    run(model, parse(f"{lower}, integerize_boundary"), ctx, [well_formed])
    assert ctx.remaining == []
    assert prove(model) == []
    both.append(model_from_graph(model))
    qdq, found = (next(iter(Session(m, threads=1).run({"x": x}).values())) for m in both)
    noise = np.square(found - qdq).mean() / np.square(qdq).mean()
    assert noise < 10**-4.5  # 8-bit steps of 12 / 255, few elements one apart


X8, X16 = ("int8", 0.05, 0), ("int16", 0.001, 0)
DECLINED = [
    ("c = Asin(a)", "lut", X8, "a table whose function is not a number at -6.4"),
    ("c = Pow(a, a)", "poly", X8, "no input or several are computed; expected one"),
    ("c = Pow(a, vector)", "poly", X8, "no input or several are computed; expected one"),
    ("c = Sigmoid(vector)", "poly", X8, "no input or several are computed; expected one"),
    ("n = Neg(a) c = Exp(n)", "poly", X8, "its input 'n' is not quantized"),
    ("n = Neg(a) s = Sigmoid(n) c = Mul(n, s)", "poly", X8, "its input 'n' is not quantized"),
    (
        "c = Exp(a)",
        "paper",
        ("int8", 1.0, 0),
        "an exponential of steps of 1; expected at most ln 2",
    ),
    ("c = Tanh(a)", "poly", ("int8", 0.05, 0), "a requantisation by"),
]


@pytest.mark.parametrize(("body", "mode", "x", "why"), DECLINED)
def test_declines_with_the_reason(place: Any, body: str, mode: str, x: Any, why: str) -> None:
    step = 2.0**-50 if why.startswith("a requantisation") else 0.05
    model = place.graph(body, ("int8", step, 0), x, vector=np.ones(6, np.float32))
    before, ctx = len(model.nodes), Context()
    assert IntegerizeNonlinear(mode=mode).run(model, ctx) == 0
    assert ctx.remaining == ctx.skipped
    assert [found.startswith(why) for _, found in ctx.remaining] == [True]
    assert len(model.nodes) == before


def test_the_result_must_be_quantized(place: Any) -> None:
    model, ctx = place.graph("d = Tanh(a) c = Neg(d)", ("int8", 0.1, 0), X8), Context()
    assert IntegerizeNonlinear().run(model, ctx) == 0
    (found,) = ctx.remaining
    assert found[1] == "its result is not quantized once; run complete_qdq before"


def test_there_are_three_modes(place: Any) -> None:
    model = place.graph("c = Tanh(a)", ("int8", 0.1, 0), X8)
    with pytest.raises(PassError, match="mode 'best'; expected one of: poly, paper, lut"):
        IntegerizeNonlinear(mode="best").run(model, Context())
