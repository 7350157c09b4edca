"""Constants of few integers are packed, wherever they stand; nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.packing import decoded
from onnx_intq.registry import load, parse
from onnx_intq.runtime import Session, optimized_ops
from onnx_intq.transform import Context, PassError, run
from onnx_intq.verify import random_feeds, well_formed

PackWeights = load("pack_weights")
DQ = "r = DequantizeLinear(w, s)"
BODIES = {
    "y = MatMulInteger(x, w)": ("uint8[3, 64] x", "int32[3, 96] y"),
    f"{DQ} y = MatMul(x, r)": ("float[3, 64] x", "float[3, 96] y"),
    f"{DQ} q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) m = MatMul(d, r) "
    "p = QuantizeLinear(m, s, u) y = DequantizeLinear(p, s, u)": (
        "float[3, 64] x",
        "float[3, 96] y",
    ),
}


def values(bits: int, dtype: npt.DTypeLike = np.int8, seed: int = 0) -> npt.NDArray[Any]:
    levels = np.arange(1 << bits).astype(dtype)
    found: npt.NDArray[Any] = np.random.default_rng(seed).choice(levels, (64, 96))
    return found


def graph(body: str, opset: int = 17, **weights: npt.NDArray[Any]) -> gs.Graph:
    x, y = BODIES.get(body, ("uint8[3, 64] x", "int32[3, 96] y"))
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    known: dict[str, npt.NDArray[Any]] = {
        "s": np.array(0.05, np.float32),
        "u": np.array(128, np.uint8),
        **weights,
    }
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted(read & set(known)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(known[name]), name))
    return graph_from_model(model)


def feeds(model: gs.Graph) -> dict[str, npt.NDArray[Any]]:
    (x,) = model.inputs
    if x.dtype == np.float32:
        return dict(random_feeds(model, {"x": x.shape}))
    return {"x": np.random.default_rng(0).integers(0, 256, x.shape).astype(x.dtype)}


def pack(model: gs.Graph, **options: int) -> int:
    """Pack; doing so again must change nothing, and the results must be the same to the bit."""
    before = Session(model_from_graph(model), threads=1).run(feeds(model))
    spec = PackWeights(**options)
    first, second = run(model, [spec, spec], Context(), [well_formed])
    assert second.changes == 0
    after = Session(model_from_graph(model), threads=1).run(feeds(model))
    assert all(np.array_equal(after[name], before[name]) for name in before)
    return first.changes


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("body", BODIES)
def test_a_weight_is_packed(body: str, bits: int) -> None:
    model = graph(body, w=values(bits))
    before = model_from_graph(model)
    assert pack(model) == 1
    after = model_from_graph(model)
    saved = before.ByteSize() - after.ByteSize()
    assert saved > 64 * 96 * (8 - bits) / 8 - 700
    assert model.opset == (21 if bits > 3 else 18)
    assert optimized_ops(after) == optimized_ops(before)
    (each,) = decoded(model)
    assert each.node.outputs[0].name == "w"


def test_unsigned_weights_and_newer_opsets() -> None:
    model = graph("y = MatMulInteger(x, w)", opset=23, w=values(2, np.uint8))
    assert pack(model) == 1
    assert model.opset == 23


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (values(8, np.uint8), {}),
        (values(5)[:, :8], {}),
        (values(5), {"bits": 4}),
        (values(5).astype(np.int32), {}),
    ],
    ids=["8 bits", "small", "too many bits", "int32"],
)
def test_what_does_not_pay_is_left(weight: npt.NDArray[Any], options: dict[str, int]) -> None:
    body = "y = Gather(w, x)" if weight.dtype == np.int32 else "y = MatMulInteger(x, w)"
    kind = "int32[3] x" if weight.dtype == np.int32 else "uint8[3, 64] x"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}) => (int32[n, m] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    net = graph_from_model(model)
    assert run(net, [PackWeights(**options)], Context(), [well_formed])[0].changes == 0
    assert net.opset == 17
    assert net.tensors()["w"].values is not None


def test_an_output_stays_a_constant() -> None:
    model = graph("y = MatMulInteger(x, w)", w=values(3))
    model.outputs.append(model.tensors()["w"])
    assert PackWeights().run(model, Context()) == 0


def test_equal_constants_are_stored_once() -> None:
    body = "a = MatMulInteger(x, w) b = MatMulInteger(x, v) y = Add(a, b)"
    model = graph(body, w=values(5), v=values(5))
    assert pack(model) == 1
    other = graph(body, w=values(5), v=values(5, seed=1))
    assert pack(other) == 2


SCAN = """<ir_version: 8, opset_import: ["" : 17]>
    g (uint8[3, 1, 64] x) => (int32[3, 1, 96] y) {
        y = Scan<num_scan_inputs = 1, body = inner (uint8[1, 64] a) => (int32[1, 96] b)
            { b = MatMulInteger(a, w) }>(x)
    }"""


def test_weights_of_a_body_are_decoded_outside() -> None:
    parsed = onnx.parser.parse_model(SCAN)
    weight = onnx.numpy_helper.from_array(values(5), "w")
    parsed.graph.initializer.append(weight)
    model = graph_from_model(parsed)
    assert pack(model) == 1
    assert [node.op for node in model.nodes][-2:] == ["Gather", "Scan"]
    body = model.nodes[-1].attrs["body"]
    assert [node.op for node in body.nodes] == ["MatMulInteger"]
    ops = optimized_ops(model_from_graph(model))
    assert ops == {"Scan": 1, "MatMulInteger": 1}


def test_bodies_may_use_one_name_twice() -> None:
    parsed = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (bool c, uint8[3, 64] x) => (int32[3, 96] y) {
            y = If<then_branch = one () => (int32[3, 96] p) { p = MatMulInteger(x, w) },
                else_branch = two () => (int32[3, 96] q) { q = MatMulInteger(x, w) }>(c)
        }""")
    for number, attribute in enumerate(parsed.graph.node[0].attribute):
        attribute.g.initializer.append(onnx.numpy_helper.from_array(values(3, seed=number), "w"))
    net = graph_from_model(parsed)
    x = np.random.default_rng(0).integers(0, 256, (3, 64)).astype(np.uint8)
    given = [{"c": np.array(c), "x": x} for c in (True, False)]
    before = [Session(model_from_graph(net), threads=1).run(each)["y"] for each in given]
    assert run(net, [PackWeights()], Context(), [well_formed])[0].changes == 2
    after = [Session(model_from_graph(net), threads=1).run(each)["y"] for each in given]
    assert all(map(np.array_equal, before, after))
    assert not np.array_equal(after[0], after[1])


@pytest.mark.parametrize("bits", [0, 8])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(PassError, match=f"indices of {bits} bits; expected 1..7"):
        run(
            graph("y = MatMulInteger(x, w)", w=values(3)),
            parse(f"pack_weights(bits={bits})"),
            Context(),
        )


def test_unpacking_is_the_inverse() -> None:
    model = graph("y = MatMulInteger(x, w)", opset=21, w=values(5))
    before = model_from_graph(model)
    reports = run(model, parse("pack_weights, unpack_weights, unpack_weights"), Context())
    assert [report.changes for report in reports] == [1, 1, 0]
    assert model_from_graph(model) == before
