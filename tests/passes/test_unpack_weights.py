"""What was packed is stored as it was; other lookups stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

SHAPE = (64, 96)


def product(levels: int, opset: int = 21) -> gs.Graph:
    """`y = x w`, w int8 with that many distinct values."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (uint8[3, 64] x) => (int32[3, 96] y) {{ y = MatMulInteger(x, w) }}"""
    model = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).choice(np.arange(levels) - levels // 2, SHAPE)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.int8), "w"))
    return graph_from_model(model)


@pytest.mark.parametrize("levels", [2, 3, 8, 31, 60])
def test_the_weight_is_a_constant_again(levels: int) -> None:
    graph = product(levels)
    before = model_from_graph(graph)
    passes = parse("pack_weights, unpack_weights, unpack_weights")
    x = {"x": np.arange(192, dtype=np.uint8).reshape(3, 64)}
    want = Session(before, threads=1).run(x)["y"]
    reports = run(graph, passes, Context(), [well_formed])
    assert [report.changes for report in reports] == [1, 1, 0]
    after = model_from_graph(graph)
    assert after == before
    assert np.array_equal(Session(after, threads=1).run(x)["y"], want)


def test_the_raised_opset_stays() -> None:
    graph = product(4, opset=17)
    run(graph, parse("pack_weights, unpack_weights"), Context(), [well_formed])
    assert graph.opset == 18
    assert [node.op for node in graph.nodes] == ["MatMulInteger"]


def test_lookups_by_an_input_stay() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 21]>
        g (uint8[n] x) => (int8[n] y) { i = Cast<to = 6>(x) y = Gather(table, i) }""")
    table = onnx.numpy_helper.from_array(np.array([-3, 5], np.int8), "table")
    model.graph.initializer.append(table)
    graph = graph_from_model(model)
    (report,) = run(graph, parse("unpack_weights"), Context(), [well_formed])
    assert report.changes == 0
    assert [node.op for node in graph.nodes] == ["Cast", "Gather"]
