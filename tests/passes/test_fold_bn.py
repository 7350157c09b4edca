import time
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph, subgraphs
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

FoldBn = load("fold_bn")
law = settings(derandomize=True, deadline=None, max_examples=40)
Weights = dict[str, tuple[int, ...]]


def graph(
    body: str, x: str, y: str, weights: Weights, channels: int = 4, inputs: str = "", seed: int = 0
) -> gs.Graph:
    """A graph with random weights, and the statistics of its BatchNormalizations."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float{x} x{inputs}) => (float{y} y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(seed)
    values = {name: random.standard_normal(shape) for name, shape in weights.items()}
    for name in ("gamma", "beta", "mean", "variance"):
        sign = random.choice([-1, 1], channels) if name in {"beta", "mean"} else 1
        values[name] = random.uniform(0.5, 2, channels) * sign
    for name, value in values.items():
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        )
    return graph_from_model(model)


def bn(result: str, source: str, attributes: str = "") -> str:
    return f"{result} = BatchNormalization{attributes}({source}, gamma, beta, mean, variance)"


def ops(model: gs.Graph) -> list[str]:
    return [node.op for sub in subgraphs(model) for node in sub.nodes]


def outputs(model: gs.Graph, shape: tuple[int, ...], **more: Any) -> Any:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return Session(model_from_graph(model), threads=1, optimize=False).run({"x": x, **more})["y"]


def fold(model: gs.Graph) -> tuple[int, Context]:
    ctx = Context()
    (report,) = run(model, [FoldBn()], ctx, [well_formed])
    assert "bn-folded" in ctx.facts
    return report.changes, ctx


def check_kept(model: gs.Graph, shape: tuple[int, ...], expected: list[str], **more: Any) -> None:
    """Folding leaves these operators and the same function, and folding again changes nothing."""
    before = outputs(model, shape, **more)
    count = ops(model).count("BatchNormalization") - expected.count("BatchNormalization")
    assert fold(model)[0] == count
    assert ops(model) == expected
    after = outputs(model, shape, **more)
    # At most 64 products and statistics, each rounded once: n * eps of the largest term, which
    # cancellation may leave larger than the result by a factor; 32 covers the seeds used.
    reach = max(1.0, float(np.abs(before).max()))
    np.testing.assert_allclose(after, before, rtol=0, atol=64 * 32 * 2.0**-24 * reach)
    assert fold(model)[0] == 0
    assert ops(model) == expected
    np.testing.assert_array_equal(outputs(model, shape, **more), after)


# It fires, and keeps the function


@pytest.mark.parametrize("bias", ["", ", c"])
@pytest.mark.parametrize(
    ("attributes", "kernel", "shape"),
    [
        ("", (4, 4, 3), (2, 4, 9)),
        ("<pads = [1, 1], strides = [2]>", (4, 4, 3), (2, 4, 9)),
        ("<group = 2, dilations = [2]>", (4, 2, 3), (2, 4, 9)),
        ("<group = 4, pads = [1, 2]>", (4, 1, 3), (2, 4, 9)),
        ("<group = 2, pads = [1, 0, 1, 0]>", (4, 2, 3, 1), (2, 4, 9, 3)),
    ],
)
def test_folds_into_a_convolution_before(
    attributes: str, kernel: tuple[int, ...], shape: tuple[int, ...], bias: str
) -> None:
    symbols = "[n, 4, t]" if len(shape) == 3 else "[n, 4, t, f]"
    body = f"a = Conv{attributes}(x, w{bias}) {bn('y', 'a')}"
    model = graph(body, symbols, symbols.replace("t", "s"), {"w": kernel, "c": (4,)})
    check_kept(model, shape, ["Conv"])


@pytest.mark.parametrize(("group", "outputs_per_group"), [(1, 4), (2, 2), (4, 1)])
def test_folds_into_a_transposed_convolution(group: int, outputs_per_group: int) -> None:
    body = f"a = ConvTranspose<group = {group}, strides = [2]>(x, w, c) {bn('y', 'a')}"
    weights: Weights = {"w": (4, outputs_per_group, 3), "c": (4,)}
    check_kept(graph(body, "[n, 4, t]", "[n, 4, s]", weights), (2, 4, 5), ["ConvTranspose"])


@pytest.mark.parametrize("bias", [None, (4,), (1,), (1, 4), (3, 1), (3, 4), ()])
@pytest.mark.parametrize(
    "attributes", ["", "<transB = 1, alpha = 0.5, beta = -2.0>", "<transA = 1>"]
)
def test_folds_into_a_gemm(attributes: str, bias: tuple[int, ...] | None) -> None:
    weights: Weights = {"w": (4, 5) if "transB" in attributes else (5, 4)}
    shape = (5, 3) if "transA" in attributes else (3, 5)
    if bias is not None:
        weights["c"] = bias
    body = f"a = Gemm{attributes}(x, w{', c' if bias is not None else ''}) {bn('y', 'a')}"
    check_kept(graph(body, str(list(shape)), "[3, 4]", weights), shape, ["Gemm"])


def test_a_product_of_matrices_becomes_a_gemm() -> None:
    model = graph(f"a = MatMul(x, w) {bn('y', 'a')}", "[n, 5]", "[n, 4]", {"w": (5, 4)})
    check_kept(model, (3, 5), ["Gemm"])


@pytest.mark.parametrize(
    ("operator", "weights"),
    [
        ("Conv(b, w)", {"w": (6, 4, 3)}),
        ("Conv<group = 2, strides = [2]>(b, w, c)", {"w": (6, 2, 3), "c": (6,)}),
        ('Conv<group = 4, auto_pad = "VALID">(b, w, c)', {"w": (8, 1, 3), "c": (8,)}),
    ],
)
def test_folds_into_an_unpadded_convolution_behind(operator: str, weights: Weights) -> None:
    body = f"a = Relu(x) {bn('b', 'a')} y = {operator}"
    check_kept(graph(body, "[n, 4, t]", "[n, m, s]", weights), (2, 4, 9), ["Relu", "Conv"])


@pytest.mark.parametrize(
    "operator", ["Gemm(b, w)", "Gemm<transB = 1, alpha = 2.0, beta = 3.0>(b, v, c)"]
)
def test_folds_into_a_gemm_behind(operator: str) -> None:
    weights: Weights = {"w": (4, 5), "v": (5, 4), "c": (1, 5)}
    body = f"{bn('b', 'x')} y = {operator}"
    check_kept(graph(body, "[n, 4]", "[n, 5]", weights), (3, 4), ["Gemm"])


def test_folds_into_several_operators_behind_even_if_they_share_weights() -> None:
    body = f"""{bn("b", "x")} c = Conv(b, w, v) d = Conv(b, w) e = Conv(x, w, v)
        f = Sum(c, d, e) y = Relu(f)"""
    model = graph(body, "[n, 4, t]", "[n, 5, t]", {"w": (5, 4, 1), "v": (5,)})
    check_kept(model, (2, 4, 6), ["Conv", "Conv", "Conv", "Sum", "Relu"])


def test_padding_is_no_obstacle_without_a_shift() -> None:
    model = graph(
        f"{bn('b', 'x')} y = Conv<pads = [1, 1]>(b, w)", "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 3)}
    )
    for name in ("beta", "mean"):
        model.tensors()[name].values[:] = 0
    check_kept(model, (2, 4, 6), ["Conv"])


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (f"a = Conv(x, w) {bn('b', 'a')} {bn('y', 'b')}", ["Conv"]),
        (f"{bn('a', 'x')} {bn('b', 'a')} y = Conv(b, w)", ["Conv"]),
        (
            f"""a = Conv(x, w) {bn("b", "a")} c = Relu(b)
                {bn("d", "c")} {bn("e", "d")} y = Conv(e, w)""",
            ["Conv", "Relu", "Conv"],
        ),
    ],
)
def test_rows_of_normalizations_fold(body: str, left: list[str]) -> None:
    check_kept(graph(body, "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)}), (2, 4, 6), left)


def test_folds_inside_a_body() -> None:
    body = f"""y = If(q) <
        then_branch = yes () => (float[n, 4, t] t) {{ a = Conv(x, w) {bn("t", "a")} }},
        else_branch = no () => (float[n, 4, t] e) {{ {bn("u", "x")} e = Conv(u, w) }}
    >"""
    for q in True, False:
        model = graph(body, "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)}, inputs=", bool q")
        check_kept(model, (2, 4, 6), ["If", "Conv", "Conv"], q=np.array(q))


def test_a_shared_weight_is_scaled_once_for_each_reader() -> None:
    body = f"a = Conv(x, w, c) {bn('b', 'a')} d = Conv(b, w, c) {bn('e', 'd')} y = Conv(e, w, c)"
    model = graph(body, "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1), "c": (4,)})
    check_kept(model, (2, 4, 6), ["Conv"] * 3)
    assert len({id(node.inputs[1]) for node in model.nodes}) == 3


def test_names_that_are_taken_are_left_alone() -> None:
    # The new bias would be called w_bias, like an input of another node.
    body = f"a = Conv(x, w) {bn('b', 'a')} c = Mul(b, w_bias) y = Add(c, b_weight)"
    model = graph(
        body, "[n, 4, 5]", "[n, 4, 5]", {"w": (4, 4, 1), "w_bias": (5,), "b_weight": (5,)}
    )
    check_kept(model, (2, 4, 5), ["Conv", "Mul", "Add"])


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_epsilon_counts(epsilon: float | None) -> None:
    attributes = f"<epsilon = {epsilon}>" if epsilon else ""
    body = f"a = Conv(x, w) {bn('y', 'a', attributes)}"
    model = graph(body, "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)})
    model.tensors()["variance"].values[:] = 1e-6
    model.tensors()["w"].values[:] *= 1e-2
    check_kept(model, (2, 4, 6), ["Conv"])


def test_the_result_keeps_its_name() -> None:
    model = graph(
        f"a = Conv(x, w) {bn('b', 'a')} y = Relu(b)", "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)}
    )
    fold(model)
    assert [t.name for t in model.nodes[0].outputs] == ["b"]
    assert "a" not in model.tensors()


@st.composite
def networks(draw: st.DrawFn) -> tuple[gs.Graph, tuple[int, ...], list[str]]:
    """A convolution and a BatchNormalization on either side of it."""
    group = draw(st.integers(1, 3))
    inputs, results = (group * draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, dilation, pad = (
        draw(st.integers(a, b)) for a, b in ((1, 4), (1, 3), (1, 2), (0, 2))
    )
    before = draw(st.booleans())
    pads = 0 if before else pad
    options = f"group = {group}, strides = [{stride}], dilations = [{dilation}]"
    conv = f"Conv<{options}, pads = [{pads}, {pads}]>"
    bias = draw(st.sampled_from(["", ", c"]))
    attributes = f"<epsilon = {draw(st.sampled_from(['0.1', '1e-3', '1e-5']))}>"
    body = f"a = {conv}(x, w{bias}) {bn('y', 'a', attributes)}"
    if before:
        body = f"{bn('b', 'x', attributes)} y = {conv}(b, w{bias})"
    weights: Weights = {"w": (results, inputs // group, kernel), "c": (results,)}
    channels, seed = inputs if before else results, draw(st.integers(0, 9))
    frames = draw(st.integers(7, 12))
    assume(frames + 2 * pads > dilation * (kernel - 1))
    model = graph(body, f"[n, {inputs}, t]", f"[n, {results}, s]", weights, channels, seed=seed)
    return model, (2, inputs, frames), ["Conv"]


@law
@given(networks())
def test_the_function_is_kept(network: tuple[gs.Graph, tuple[int, ...], list[str]]) -> None:
    check_kept(*network)


# It declines, with the reason


DECLINED = [
    (
        f"{bn('b', 'x')} y = Conv<pads = [1, 1]>(b, w)",
        "nor after (Conv_1 pads with zeros after the",
    ),
    (f'{bn("b", "x")} y = Conv<auto_pad = "SAME_UPPER">(b, w)', "Conv_1 pads with zeros"),
    (
        f"a = Conv(x, v) {bn('b', 'a')} c = Relu(a) y = Add(b, c)",
        "Conv_0's result is read elsewhere",
    ),
    (f"a = Conv(x, v) {bn('b', 'a')} y = Sub(a, b)", "nor after (Sub_2 is no convolution or Gemm)"),
    (f"{bn('b', 'x')} y = MatMul(b, m)", "nor after (MatMul_1 is no convolution or Gemm)"),
    (bn("y", "x", "<training_mode = 0>"), "before (it is no convolution or matrix product)"),
    (bn("y", "x"), "nor after (it is a graph output)"),
    (f"u = Relu(v) a = Conv(x, u) {bn('b', 'a')} y = Relu(b)", "Conv_1's weights are not constant"),
    (f"u = Relu(k) a = Conv(x, v, u) {bn('b', 'a')} y = Relu(b)", "Conv_1's weights are not const"),
    (f"u = Relu(v) {bn('b', 'x')} y = Conv(b, u)", "nor after (Conv_2's weights are not constant)"),
    (
        f"a = MatMul(x, m) {bn('b', 'a')} y = Relu(b)",
        "MatMul_0's result is not of rank 2, its channels",
    ),
    ("u = Relu(mean) y = BatchNormalization(x, gamma, beta, u, variance)", "are not constant and"),
    (
        "y = BatchNormalization(x, gamma, beta, mean, k)",
        "its statistics are not constant and finite",
    ),
    (
        "y, p, q = BatchNormalization<training_mode = 1>(x, gamma, beta, mean, variance)",
        "its statistics are not constant and finite, or it is in training mode",
    ),
]


@pytest.mark.parametrize(("body", "why"), DECLINED)
def test_declines(body: str, why: str) -> None:
    weights: Weights = {"w": (4, 4, 3), "v": (4, 4, 1), "k": (4,), "m": (4, 4)}
    model = graph(body, "[n, 4, 4]", "[n, 4, 4]", weights)
    if "k" in model.tensors():
        model.tensors()["k"].values[:] = -1  # no variance
    before = ops(model)
    changes, ctx = fold(model)
    assert changes == 0
    assert ops(model) == before
    ((name, reason),) = ctx.remaining
    assert name.startswith("BatchNormalization_")
    assert why in reason
    assert ctx.skipped == ctx.remaining


def test_declines_where_the_tensor_between_is_an_output() -> None:
    model = graph(f"a = Conv(x, w) {bn('y', 'a')}", "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)})
    model.outputs.append(model.nodes[0].outputs[0])
    ((_, why),) = fold(model)[1].remaining
    assert "not into the operator before (Conv_0's result is read elsewhere too)" in why


def test_declines_where_its_own_result_is_an_output_that_is_read_too() -> None:
    model = graph(f"{bn('b', 'x')} y = Conv(b, w)", "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)})
    model.outputs.append(model.nodes[0].outputs[0])
    ((_, why),) = fold(model)[1].remaining
    assert "nor after (it is a graph output)" in why


def test_declines_a_gemm_that_transposes_what_it_would_scale() -> None:
    body = f"{bn('b', 'x')} y = Gemm<transA = 1>(b, w)"
    ((_, why),) = fold(graph(body, "[3, 4]", "[4, 5]", {"w": (3, 5)}))[1].remaining
    assert "nor after (Gemm_1 transposes its input)" in why


def test_a_body_does_not_fold_into_what_is_outside_it() -> None:
    body = f"""a = Conv(x, w) y = If(q) <
        then_branch = yes () => (float[n, 4, t] t) {{ {bn("t", "a")} }},
        else_branch = no () => (float[n, 4, t] e) {{ e = Neg(x) }}
    >"""
    model = graph(body, "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)}, inputs=", bool q")
    ((name, why),) = fold(model)[1].remaining
    assert name == "body1_BatchNormalization_0"
    assert "not into the operator before (it is no convolution or matrix product)" in why


def chain(count: int) -> gs.Graph:
    """Four nodes `count` times over, each with weights of its own, as in real models."""
    names = ["x", *(f"r{i}" for i in range(1, count)), "y"]
    blocks = (
        f"a{i} = Conv({names[i]}, w) {bn(f'b{i}', f'a{i}')} c{i} = Identity(b{i}) "
        f"{names[i + 1]} = Relu(c{i})"
        for i in range(count)
    )
    model = graph("\n".join(blocks), "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)})
    for node in model.nodes:
        node.inputs = [
            gs.Constant(f"{node.name}_{i}", t.values) if isinstance(t, gs.Constant) else t
            for i, t in enumerate(node.inputs)
        ]
    return model


def test_time_is_linear() -> None:
    """Four times the nodes take about four times as long; twice that is for noise."""
    times = []
    for count in (250, 1000):
        model = chain(count)
        start = time.process_time()
        reports = run(model, parse("fold_constants, drop_identity, fold_bn"), Context())
        times.append(time.process_time() - start)
        assert [r.changes for r in reports] == [0, count, count]
    assert times[1] < 8 * times[0]


def test_weights_keep_their_type() -> None:
    model = graph(f"a = Conv(x, w) {bn('y', 'a')}", "[n, 4, t]", "[n, 4, t]", {"w": (4, 4, 1)})
    model.tensors()["w"].values = model.tensors()["w"].values.astype(np.float64)
    FoldBn().run(model, Context())
    assert [t.dtype for t in model.nodes[0].inputs[1:]] == [np.float64] * 2
