"""Patterns of node names in one graph and in several."""

import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.node_patterns import matching, require_matches
from onnx_intq.registry import parse
from onnx_intq.transform import IntqError


def graph(*names: str) -> gs.Graph:
    """MatMul nodes of these names, one behind the other, and a Relu."""
    lines = [f"[{name}] t{i + 1} = MatMul(t{i}, w)" for i, name in enumerate(names)]
    return graph_from_model(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[2, 2] t0, float[2, 2] w) => (float[2, 2] y)
            {{ {" ".join(lines)} [last] y = Relu(t{len(names)}) }}"""
        )
    )


def test_patterns_have_to_name_something() -> None:
    require_matches(graph("a", "b"), parse("insert_qdq(keep=('a',)), quantize_weights"))
    with pytest.raises(IntqError, match=r"no node matches 'c\*'; expected .* such as 'a'; correct"):
        require_matches(graph("a", "b"), parse("quantize_weights(overrides=(('c*', 4),))"))
    with pytest.raises(IntqError, match="no node matches 'last'"):
        require_matches(graph("a"), parse("insert_qdq(keep=('last',))"))


def test_where_there_is_nothing_to_quantize_that_is_said_later() -> None:
    require_matches(graph(), parse("insert_qdq(keep=('a',))"))


def test_of_several_graphs_each_gets_its_own_patterns() -> None:
    recipe = parse("insert_qdq(keep=('a', 'b*')), quantize_weights(overrides=(('*2', 4),))")
    first, second = matching([graph("a", "a2"), graph("b1", "c")], [recipe, recipe])
    assert first == parse("insert_qdq(keep=('a',)), quantize_weights(overrides=(('*2', 4),))")
    assert second == parse("insert_qdq(keep=('b*',)), quantize_weights")
    with pytest.raises(IntqError, match="no node matches 'b"):
        matching([graph("a", "a2"), graph("c")], [recipe, recipe])
