import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import observed
from onnx_intq.graph import graph_from_model
from onnx_intq.placement import Plan, is_bias, origin, plan
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
MATRIX = (
    "<float[4, 4] w = {1, 0, 2, 0, 0, 1, 0, 1, 3, 0, 1, 0, 0, 2, 0, 1}, float[4] b = {1, 2, 3, 4}>"
)
KERNELS = {"k": (4, 4, 1), "d": (4, 1, 3), "p": (4, 4, 1), "r": (4, 4, 1), "h": (3, 4, 1)}
QUARTZNET = """
    d1 = Conv<group = 4, pads = [1, 1]>(x, d)
    p1 = Conv(d1, p)
    a1 = Relu(p1)
    d2 = Conv<group = 4, pads = [1, 1]>(a1, d)
    p2 = Conv(d2, p)
    r2 = Conv(x, r)
    s2 = Add(p2, r2)
    a2 = Relu(s2)
    l = Conv(a2, h)
    t = Transpose<perm = [0, 2, 1]>(l)
    y = LogSoftmax(t)
"""


def filled(name: str, *shape: int) -> str:
    values = ", ".join(["0.5"] * int(np.prod(shape)))
    return f"float[{', '.join(map(str, shape))}] {name} = {{{values}}}"


def graph(
    body: str, inputs: str = "float[n, 4, t] x", outputs: str = "float[n, t, 3] y", more: str = ""
) -> gs.Graph:
    """A graph over [n, 4, t], whose weights are called as in `KERNELS`."""
    weights = ", ".join(filled(name, *shape) for name, shape in KERNELS.items())
    text = f"{HEADER} g ({inputs}) => ({outputs}) <{weights}{more}> {{ {body} }}"
    return graph_from_model(onnx.parser.parse_model(text))


def matrices(body: str, inputs: str = "float[n, 4] x", outputs: str = "float[n, 4] y") -> gs.Graph:
    """A graph over [n, 4] with a weight w and a bias b."""
    text = f"{HEADER} g ({inputs}) => ({outputs}) {MATRIX} {{ {body} }}"
    return graph_from_model(onnx.parser.parse_model(text))


def nodes(found: Plan) -> list[str]:
    return [node.name for node in found.nodes]


def reasons(found: Plan) -> dict[str, str]:
    return {node.name: why for node, why in found.skipped}


# QuartzNet


def test_ort_gets_every_operators_inputs_and_results() -> None:
    found = plan(graph(QUARTZNET), "ort")
    assert nodes(found) == ["Conv_0", "Conv_1", "Conv_3", "Conv_4", "Conv_5", "Add_6", "Conv_8"]
    # No pair between p1 and its Relu, nor between s2 and its own.
    assert list(found.tensors) == ["x", "d1", "a1", "d2", "p2", "r2", "a2", "l"]
    assert found.integers == {"d1", "a1", "d2", "p2", "r2", "a2", "l"}
    assert not found.skipped


def test_tensorrt_gets_inputs_and_the_shorter_residual_branch() -> None:
    found = plan(graph(QUARTZNET), "tensorrt")
    assert nodes(found) == nodes(plan(graph(QUARTZNET), "ort"))
    assert list(found.tensors) == ["x", "d1", "a1", "d2", "r2", "a2"]
    assert not found.integers
    assert not found.skipped


def test_the_shorter_branch_is_found_on_either_side() -> None:
    found = plan(graph(QUARTZNET.replace("Add(p2, r2)", "Add(r2, p2)")), "tensorrt")
    assert "r2" in found.tensors
    assert "p2" not in found.tensors


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_every_planned_tensor_is_calibrated(target: str) -> None:
    for model in graph(QUARTZNET), matrices("c = MatMul(x, w) d = Add(c, b) y = Relu(d)"):
        assert set(plan(model, target).tensors) <= set(observed(model))


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_nodes_stay_float_by_request(target: str) -> None:
    found = plan(graph(QUARTZNET), target, ("Conv_[13]", "*_4"))
    assert reasons(found) == {
        "Conv_1": "kept float by request",
        "Conv_3": "kept float by request",
        "Conv_4": "kept float by request",
        "Add_6": "one of its inputs is made by an operator that stays float",
    }
    assert nodes(found) == ["Conv_0", "Conv_5", "Conv_8"]
    # Conv_1 reads d1, which Conv_0 gives as integers; x exists in float, too.
    assert found.integers == ({"d1", "r2", "l"} if target == "ort" else set())


# Matrix products


def test_a_bias_and_an_activation_fuse_with_a_product() -> None:
    model = matrices("c = MatMul(x, w) d = Add(b, c) e = Relu(d) y = Gemm(e, w, b)")
    found = plan(model, "ort")
    assert nodes(found) == ["MatMul_0", "Gemm_3"]
    assert list(found.tensors) == ["x", "e", "y"]
    assert not found.skipped
    assert is_bias(model.nodes[1])


def test_a_bias_that_is_not_alone_does_not_fuse() -> None:
    model = matrices("c = MatMul(x, w) d = Add(c, b) z = Sub(d, c) y = MatMul(c, w)")
    found = plan(model, "ort")
    assert list(found.tensors) == ["x", "c", "y"]


def test_both_factors_may_be_computed() -> None:
    found = plan(matrices("c = Transpose<perm = [1, 0]>(x) y = MatMul(x, c)"), "ort")
    assert list(found.tensors) == ["x", "c", "y"]
    assert found.integers == {"y"}


def test_a_constant_may_be_the_left_factor() -> None:
    found = plan(matrices("y = MatMul(w, x)", "float[4, n] x", "float[4, n] y"), "ort")
    assert list(found.tensors) == ["x", "y"]


def test_a_clip_is_an_activation_but_its_bounds_are_none() -> None:
    clipped = matrices("c = MatMul(x, w) y = Clip(c)")
    assert list(plan(clipped, "ort").tensors) == ["x", "y"]
    text = "c = MatMul(x, w) low = ReduceMin<keepdims = 0>(c) z = Abs(x) z2 = Clip(z, low)"
    found = plan(matrices(f"{text} y = MatMul(c, w)"), "ort")
    assert list(found.tensors) == ["x", "c", "y"]


def test_a_product_that_only_floats_read_gives_floats() -> None:
    body = "c = MatMul(x, w) d = Add(c, b) e = {}(d) y = MatMul(e, w)"
    for op, integers in ("Exp", {"y"}), ("Relu", {"e", "y"}), ("Identity", {"d", "y"}):
        assert plan(matrices(body.format(op)), "ort").integers - {"e"} == integers - {"e"}
    convolution = graph("a = Conv(x, p) b = Exp(a) c = Conv(b, h) y = Softmax(c)")
    assert plan(convolution, "ort").integers == {"a", "c"}


@pytest.mark.parametrize(
    ("reader", "tables", "eight"),
    [
        ("Sub(c, x)", False, False),
        ("Softmax(c)", True, False),
        ("Sigmoid(c)", False, False),
        ("Sigmoid(c)", True, True),
        ("MatMul(c, w)", False, True),
        ("LogSoftmax(c)", False, True),
    ],
)
def test_results_for_target_integer_have_8_bits_for_products_and_tables(
    reader: str, *, tables: bool, eight: bool
) -> None:
    found = plan(matrices(f"c = Gemm(x, w, b) y = {reader}"), "integer", tables=tables)
    assert ("c" in found.integers) == eight


def test_logits_behind_attention_have_16_bits_for_target_integer() -> None:
    body = "a = Softmax(x) c = Gemm(a, w, b) y = LogSoftmax(c)"
    assert "c" not in plan(matrices(body), "integer").integers


# What stays float


@pytest.mark.parametrize(
    ("body", "name", "why"),
    [
        ("c = Relu(x) y = Add(c, b)", "Add_1", "adds a constant, which is cheap and exact"),
        ("c = Relu(w) y = Gemm(x, c)", "Gemm_1", "its weights are computed at run time"),
        ("c = MatMul(w, w) y = Add(x, c)", "MatMul_0", "all its inputs are constant"),
        ("c = MatMul(x, w) d = Exp(x) y = Add(c, d)", "Add_2", "made by an operator that stays"),
        ("c = MatMul(x, w) y = Add(c, x)", "Add_1", "made by an operator that stays float"),
        ("c = Gemm(x, w) d = Abs(c) y = Log(d)", "Gemm_0", "part of the mel front end"),
        ("c = Gemm(x, w) d = Abs(c) y = Sqrt(d)", "Gemm_0", "its result must stay float, and ort"),
        ("q = DequantizeLinear(z, s) y = MatMul(q, w)", "MatMul_1", "quantized already"),
    ],
)
def test_the_reason_is_told(body: str, name: str, why: str) -> None:
    model = matrices(body, "float[n, 4] x, int8[n, 4] z, float s")
    assert why in reasons(plan(model, "ort"))[name]


def test_shape_arithmetic_is_no_candidate() -> None:
    text = """s = Shape(x) t = Shape(x) a = Squeeze(s) c = Squeeze(t) u = Add(a, c)
        y = MatMul(x, w)"""
    found = plan(matrices(text), "ort")
    assert nodes(found) == ["MatMul_5"]
    assert not found.skipped


def test_results_of_unknown_type_stay_float() -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[4, 4] x) => (float[4, 4] y) {MATRIX} {{
            a = com.microsoft.Gelu(x)
            c = MatMul(a, w)
            y = Relu(c)
        }}"""
    found = plan(graph_from_model(onnx.parser.parse_model(text)), "ort")
    assert reasons(found) == {"MatMul_1": "the type of its result is unknown"}


def test_a_transposed_convolution_stays_float_where_there_is_no_integer_one() -> None:
    body = "c = ConvTranspose(x, k) y = Transpose<perm = [0, 2, 1]>(c)"
    model = graph(body, outputs="float[n, t, 4] y")
    assert reasons(plan(model, "ort")) == {"ConvTranspose_0": "ort has no integer ConvTranspose"}
    assert nodes(plan(model, "tensorrt")) == ["ConvTranspose_0"]


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_a_front_end_stays_float_up_to_its_logarithm(target: str) -> None:
    body = """f = Conv(x, k)
        power = Pow(f, two)
        mel = MatMul(filters, power)
        floor = Clip(mel, small)
        log = Log(floor)
        c = Conv(log, p)
        y = Transpose<perm = [0, 2, 1]>(c)"""
    more = f", float two = {{2}}, float small = {{0.001}}, {filled('filters', 4, 4)}"
    found = plan(graph(body, outputs="float[n, t, 4] y", more=more), target)
    why = "part of the mel front end, whose dynamic range int8 cannot hold"
    assert reasons(found) == {"Conv_0": why, "MatMul_2": why}
    assert nodes(found) == ["Conv_5"]
    assert list(found.tensors) == (["log", "c"] if target == "ort" else ["log"])


@pytest.mark.parametrize(
    "ending", ["s = Softmax(c) y = Log(s)", "e = Exp(c) s = ReduceSum(e) l = Log(s) y = Sub(c, l)"]
)
def test_a_softmaxs_logarithm_is_no_front_end(ending: str) -> None:
    assert nodes(plan(matrices(f"c = MatMul(x, w) {ending}"), "ort")) == ["MatMul_0"]


@pytest.mark.parametrize("op", ["Sqrt", "Reciprocal"])
def test_inputs_of_amplifying_operators_stay_float(op: str) -> None:
    body = f"""c = MatMul(x, w) s = Softmax(c) d = MatMul(s, w) e = Mul(d, x) f = Add(e, b)
        g = {op}(f) y = MatMul(f, w)"""
    found = plan(matrices(body), "ort")
    # d, which reaches the operator, is not quantized, and f is for the last product alone.
    assert list(found.tensors) == ["x", "s", "f", "y"]
    assert found.integers == {"y"}


def test_a_division_by_a_constant_amplifies_nothing() -> None:
    product = "c = MatMul(x, w) d = MatMul(c, w)"
    assert plan(matrices(f"{product} y = Div(c, b)"), "ort").integers == {"c", "d"}
    assert plan(matrices(f"{product} y = Div(x, c)"), "ort").integers == {"d"}
    assert plan(matrices(f"{product} y = Pow(c, b)"), "ort").integers == {"d"}


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("between", ["", "Transpose<perm = [0, 1]>", "Reshape"])
def test_a_sum_that_a_layer_normalization_reads_stays_float(target: str, between: str) -> None:
    moved = f"m = {between}(s{', z' if between == 'Reshape' else ''})" if between else ""
    body = f"""c = MatMul(x, w) d = MatMul(c, w) s = Add(c, d) {moved}
        n = LayerNormalization({"m" if moved else "s"}, b) y = MatMul(n, w)"""
    found = plan(matrices(body, "float[n, 4] x, int64[2] z"), target)
    (why,) = reasons(found).values()
    assert why == "a residual sum that a LayerNormalization reads; int8 would lose it"


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_a_sum_that_reaches_an_amplifying_operator_stays_float(target: str) -> None:
    body = "c = MatMul(x, w) d = MatMul(c, w) s = Add(c, d) e = Abs(s) y = Sqrt(e)"
    found = plan(matrices(body), target)
    assert reasons(found) == {"Add_2": "its sum reaches an operator that amplifies rounding errors"}
    assert list(found.tensors) == ["x", "c"]
    assert not found.integers


def test_a_sum_of_biased_activated_and_moved_products_is_quantized() -> None:
    body = """c = MatMul(x, w) d = Add(c, b) e = Relu(d) f = Reshape(e, z)
        g = MatMul(x, w) h = Relu(w) s = Add(f, g) y = Add(s, h)"""
    found = plan(matrices(body, "float[n, 4] x, int64[2] z"), "ort")
    assert nodes(found) == ["MatMul_0", "MatMul_4", "Add_6"]
    assert reasons(found) == {"Add_7": "one of its inputs is made by an operator that stays float"}


# Operators that move values


def test_moved_tensors_come_from_one_origin() -> None:
    body = """c = Conv(x, k) m = MaxPool<kernel_shape = [2]>(c)
        t = Transpose<perm = [0, 2, 1]>(m) y = Relu(t)"""
    tensors = graph(body, outputs="float[n, t, 4] y").tensors()
    assert [t.name for t in origin(tensors["t"])] == ["t", "m", "c"]
    assert [t.name for t in origin(tensors["y"])] == ["y"]


def test_tensors_moved_from_integers_are_integers() -> None:
    body = """c = Conv(x, k) m = MaxPool<kernel_shape = [2]>(c)
        n = Transpose<perm = [0, 1, 2]>(m) d = Conv(n, p) e = MaxPool<kernel_shape = [2]>(x)
        f = Conv(e, p) y = Transpose<perm = [0, 2, 1]>(f)"""
    found = plan(graph(body, outputs="float[n, t, 4] y"), "ort")
    assert found.integers == {"c", "n", "d", "f"}
    assert list(found.tensors) == ["x", "c", "n", "d", "e", "f"]


# Bodies


def branch(inside: str, after: str = "") -> gs.Graph:
    body = f"""a = MatMul(x, w)
        c = If(q) <
            then_branch = yes () => (float[n, 4] t) {{ t = {inside} }},
            else_branch = no () => (float[n, 4] e) {{ e = Neg(x) }}
        > {after}
        y = MatMul(c, w)"""
    return matrices(body, "float[n, 4] x, bool q")


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_products_in_bodies_are_refused_unless_kept(target: str) -> None:
    with pytest.raises(IntqError, match="MatMul 'body1_MatMul_0' stands in the body of an If"):
        plan(branch("MatMul(x, w)"), target)
    assert nodes(plan(branch("MatMul(x, w)"), target, ["body1_*"])) == ["MatMul_0", "MatMul_2"]


def test_an_activation_in_a_body_does_not_fuse() -> None:
    model = branch("Relu(a)", "z = MatMul(a, w)")
    found = plan(model, "ort")
    assert list(found.tensors) == ["x", "a", "z", "c", "y"]
    assert set(found.tensors) <= set(observed(model))


def test_an_amplifying_operator_in_a_body_counts() -> None:
    assert plan(branch("Sqrt(a)"), "ort").integers == {"y"}
    assert "MatMul_0" in reasons(plan(branch("Log(a)"), "ort"))


def test_targets_are_checked() -> None:
    with pytest.raises(IntqError, match="unknown target 'x'; expected one of: ort, integer, "):
        plan(matrices("y = MatMul(x, w)"), "x")
