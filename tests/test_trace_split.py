"""`np.split` of a traced value."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import Names, model_from_graph
from onnx_intq.runtime import Session
from onnx_intq.trace import Builder


@pytest.mark.parametrize(
    ("sections", "axis"), [(4, -1), ([3], 1), ([1, 4, 6], -1), (2, 0), ([0, 8], 1)]
)
def test_the_parts_are_numpys(sections: int | list[int], axis: int) -> None:
    graph = gs.Graph(opset=21)
    build = Builder(graph, Names(graph), {})
    graph.inputs = [gs.Variable("x", np.int32, [2, 8])]
    traced: Any = build.value(graph.inputs[0], -9, 9)
    parts: list[Any] = np.split(traced, sections, axis=axis)
    graph.outputs = [part.tensor for part in parts]
    x = np.random.default_rng(0).integers(-9, 10, (2, 8)).astype(np.int32)
    found = Session(model_from_graph(graph)).run({"x": x})
    want = np.split(x, sections, axis=axis)
    assert [v.tolist() for v in found.values()] == [v.tolist() for v in want]
    assert [tuple(p.tensor.shape) for p in parts] == [v.shape for v in want]
    assert all((p.low, p.high) == (-9, 9) for p in parts)
    assert [node.op for node in graph.nodes] == ["Split"]
