from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import graph_from_model
from onnx_intq.reference import layers
from onnx_intq.registry import parse
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6, t] x) => (float[n, 4, s] y) {{ {body} }}"""


def quantized(body: str, shape: tuple[int, ...], last: str) -> tuple[gs.Graph, gs.Graph, int]:
    model = onnx.parser.parse_model(TEXT.format(body=body))
    w = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    net = graph_from_model(model)
    made = net.copy()
    x = np.random.default_rng(1).standard_normal((2, 6, 30)).astype(np.float32)
    ctx = Context({"bn-folded", "calibrated", "reference"}, reference=net)
    ctx.ranges = calibrate(net, [{"x": x}], threads=1).select()
    recipe = f"insert_qdq, quantize_weights(bits=4, scale='minmax'), {last}"
    return net, made, run(made, parse(recipe), ctx, [well_formed])[-1].changes


def sums(net: gs.Graph, made: gs.Graph) -> np.ndarray:
    """The sums of an output channel's rounding errors, in steps."""
    (layer,) = layers(made, net)
    found = layer.quantized_weight
    shape = [-1 if i == found.axis else 1 for i in range(found.centred.ndim)]
    error = found.centred - layer.float_weight / found.scales.reshape(shape)
    axes = tuple(i for i in range(error.ndim) if i != found.axis)
    return np.asarray(np.abs(error.sum(axis=axes)))


MATMUL = """t = Transpose<perm = [0, 2, 1]>(x)  m = MatMul(t, w)
    y = Transpose<perm = [0, 2, 1]>(m)"""


@pytest.mark.parametrize(("body", "shape"), [("y = Conv(x, w)", (4, 6, 3)), (MATMUL, (6, 4))])
def test_errors_of_every_output_channel_cancel(body: str, shape: tuple[int, ...]) -> None:
    net, nearest, _ = quantized(body, shape, "drop_identity")
    _, made, changes = quantized(body, shape, "balance_rounding")
    assert changes == 1
    assert sums(net, nearest).max() > 0.51
    assert sums(net, made).max() <= 0.501


def test_balancing_again_changes_no_sum() -> None:
    body = "y = Conv(x, w)"
    net, once, _ = quantized(body, (4, 6, 3), "balance_rounding")
    _, twice, changes = quantized(body, (4, 6, 3), "balance_rounding, balance_rounding")
    assert sums(net, twice).max() <= 0.501
    assert changes in {0, 1}
    assert sums(net, once).shape == (4,)


def test_a_codebook_is_left_alone() -> None:
    model = onnx.parser.parse_model(TEXT.format(body="y = Conv(x, w)"))
    w = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    net = graph_from_model(model)
    ctx = Context({"reference"}, reference=net.copy())
    report = run(net, parse("quantize_codebook(bits=3), balance_rounding"), ctx)[-1]
    assert report.changes == 0
    assert [why for _, why in report.skipped] == ["its weight lies on a codebook, not on a grid"]
