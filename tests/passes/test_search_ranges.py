from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.registry import parse
from onnx_intq.transform import Context, PassError, Range, run

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6, t] x) => (float[n, m, s] y) {{ {body} }}"""
TWO = "p = Conv<pads = [1, 1]>(x, a)  q = Conv(x, b)  r = Add(p, q)  y = Conv(r, c)"


def graph(body: str, **weights: np.ndarray) -> gs.Graph:
    model = onnx.parser.parse_model(TEXT.format(body=body))
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    return graph_from_model(model)


def two() -> gs.Graph:
    random = np.random.default_rng(0)
    shapes = {"a": (5, 6, 3), "b": (5, 6, 1), "c": (4, 5, 1)}
    return graph(TWO, **{name: random.standard_normal(shape) for name, shape in shapes.items()})


def search(
    net: gs.Graph, ranges: dict[str, Range], text: str = "search_ranges", scale: float = 1.0
) -> tuple[Context, int]:
    x = scale * np.random.default_rng(1).uniform(-1, 1, (2, 6, 50)).astype(np.float32)
    ctx = Context({"calibrated", "data", "bn-folded"}, ranges, [{"x": x}])
    return ctx, run(net, parse(text), ctx)[-1].changes


@pytest.mark.parametrize("text", ["search_ranges", "search_ranges(target='tensorrt')"])
def test_ranges_too_wide_shrink_and_ranges_too_narrow_grow(text: str) -> None:
    for start, lowest, highest in ((2.0, 0.9, 1.3), (0.5, 0.9, 1.3), (1.0, 0.8, 1.2)):
        ctx, _ = search(two(), {"x": (-start, start), "r": (-9.0, 9.0)}, text)
        assert lowest <= ctx.ranges["x"][1] <= highest
        assert ctx.ranges["x"][0] == -ctx.ranges["x"][1]


def test_a_channel_that_nobody_multiplies_does_not_count() -> None:
    w = np.ones((4, 6, 1))
    w[:, 0] = 0
    net = graph("y = Conv(x, w)", w=w)
    x = np.random.default_rng(1).uniform(-1, 1, (2, 6, 50)).astype(np.float32)
    x[:, 0] *= 4
    ctx = Context({"calibrated", "data"}, {"x": (-4.0, 4.0)}, [{"x": x}])
    for _ in range(2):
        run(net, parse("search_ranges"), ctx)
    assert ctx.ranges["x"][1] <= 1.5


def test_searching_again_changes_nothing_and_the_graph_stays() -> None:
    net, ranges = two(), {"x": (-1.0, 1.0), "r": (-9.0, 9.0), "y": (-1.0, 1.0)}
    nodes = len(net.nodes)
    ctx, _ = search(net, ranges)
    again, changes = search(net, dict(ctx.ranges))
    assert changes == 0
    assert again.ranges == ctx.ranges
    assert ctx.ranges["y"] == ranges["y"]
    assert len(net.nodes) == nodes


def test_what_has_no_rows_is_named_and_what_has_no_range_left_to_the_next_pass() -> None:
    net = graph('y = Conv<auto_pad = "SAME_UPPER">(x, w)', w=np.ones((4, 6, 3)))
    ctx, changes = search(net, {"x": (-1.0, 1.0)})
    assert changes == 0
    assert "auto_pad" in ctx.skipped[0][1]
    assert search(two(), {"r": (-1.0, 1.0)})[0].ranges.keys() == {"r"}


def test_silent_data_changes_nothing() -> None:
    ranges = {"x": (-1.0, 1.0), "r": (-9.0, 9.0)}
    ctx, _ = search(two(), ranges, scale=0.0)
    assert {name: high for name, (_, high) in ctx.ranges.items()}.keys() == ranges.keys()


def test_other_widths_are_refused() -> None:
    with pytest.raises(PassError, match="4-bit activations; expected 8 or 16"):
        search(two(), {"x": (-1.0, 1.0)}, "search_ranges(bits=4)")
