from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import Names, graph_from_model, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.lowering import GRIDS, Operand
from onnx_intq.moving import common_grid, constant_on, places, regrid, users
from onnx_intq.runtime import Session
from onnx_intq.value import Builder

law = settings(max_examples=100, deadline=None)
TYPES = st.sampled_from(sorted(GRIDS))


def graph(body: str) -> gs.Graph:
    """Inputs x, x2 on one grid as a, b; x3 on another as d; constants within and outside."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (int8[2, 4] x, int8[2, 4] x2, int8[2, 4] x3, float[2, 4] f, bool[2, 4] m)
        => (float[2, 4] y) <float s = {{0.1}}, float s3 = {{0.2}}, int8 z = {{-3}},
            float inside = {{2.0}}, float outside = {{99.0}},
            int64[4] pads = {{0, 0, 1, 1}}, int64[2] size = {{2, 4}}> {{
            a = DequantizeLinear(x, s, z) b = DequantizeLinear(x2, s, z)
            d = DequantizeLinear(x3, s3, z) k = DequantizeLinear(z, s3, z) {body}
        }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return graph_from_model(model)


SAME = [
    "y = Transpose(a)",
    "y = Where(m, a, inside)",
    "y = Where(m, inside, a)",
    "y = Concat<axis = 0>(a, b, a)",
    "y = Max(a, inside, k)",
    "y = Pad(a, pads)",
    "y = Pad(a, pads, inside)",
    "y = Expand(a, size)",
]
DIFFERENT = [
    "y = Where(m, a, d)",
    "y = Where(m, a, outside)",
    "y = Where(m, a, f)",
    "y = Concat<axis = 0>(d, a)",
    "y = Min(a, outside)",
    "y = Pad(a, pads, outside)",
    "y = Where(m, inside, outside)",
    "y = Transpose(f)",
    "y = Relu(a)",
    "y = Add(a, b)",
]


@pytest.mark.parametrize("body", SAME)
def test_one_grid_for_all_is_the_result_s(body: str) -> None:
    model = graph(body)
    found = common_grid(model.nodes[-1])
    assert found is not None
    assert found.tensor.name == "x"
    assert (found.scale, found.zero_point) == (float(np.float32(0.1)), -3)


@pytest.mark.parametrize("body", DIFFERENT)
def test_others_need_a_grid_of_their_own(body: str) -> None:
    assert common_grid(graph(body).nodes[-1]) is None


def test_places_are_the_inputs_whose_values_are_moved() -> None:
    expected = {
        "y = Where(m, a, b)": [1, 2],
        "y = Concat<axis = 0>(a, b, d)": [0, 1, 2],
        "y = Pad(a, pads, inside)": [0],
        "y = Add(a, b)": [],
    }
    assert {body: list(places(graph(body).nodes[-1])) for body in expected} == expected


def test_users_are_behind_moves_and_joins_with_constants() -> None:
    body = """t = Transpose(f) w = Where(m, t, inside) l, r = Split<axis = 0, num_outputs = 2>(w)
        n = Neg(l) c = Concat<axis = 0>(r, a) p = Add(t, n) q = Max(p, a) y = Abs(q)"""
    model = graph(body)
    found = [node.op for node in users(model.tensors()["f"])]
    assert found == ["Neg", "Concat", "Add"]
    assert [node.op for node in users(model.tensors()["p"])] == ["Max"]


def built(x: str, y: str, emit: Any) -> Any:
    """Runs what `emit` appends, on all integers of type `x`."""
    tensor = gs.Variable("x", np.dtype(x), ["n"])
    model = gs.Graph(inputs=[tensor], opset=21, name="g")
    result = emit(tensor, Builder(model, Names(model), {}))
    model.outputs = [gs.Variable("y", np.dtype(y), ["n"])]
    model.nodes.append(gs.Node("Identity", "last", {}, [result], model.outputs))
    info = np.iinfo(x)
    values = np.arange(info.min, info.max + 1).astype(x)
    return values, Session(model_from_graph(model)).run({"x": values})["y"]


@law
@given(TYPES, TYPES, st.sampled_from([0.01, 0.02, 0.0201, 0.7]), st.data())
def test_regridded_is_requantised_and_cut(
    x: str, y: str, scale: float, data: st.DataObject
) -> None:
    grids = GRIDS[x], GRIDS[y]
    xz, yz = (data.draw(st.integers(grid.low, grid.high)) for grid in grids)
    first, last = sorted(data.draw(st.integers(grids[1].low, grids[1].high)) for _ in range(2))
    target = Operand(tensor=gs.Variable("t"), scale=0.02, zero_point=yz, grid=grids[1])

    def emit(tensor: gs.Tensor, builder: Builder) -> gs.Tensor:
        source = Operand(tensor=tensor, scale=scale, zero_point=xz, grid=grids[0])
        return regrid(source, target, builder, first, last).tensor

    values, found = built(x, y, emit)
    limits = {"zero_point": yz, "low": first, "high": last}
    multiplier = dyadic(scale / 0.02, 62 - grids[1].bits)
    expected = requantize(values.astype(np.int64) - xz, multiplier, **limits)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", GRIDS)
def test_the_same_grid_needs_no_node(name: str) -> None:
    grid = GRIDS[name]
    tensor = gs.Variable("x", grid.dtype, ["n"])
    x = Operand(tensor=tensor, scale=0.1, zero_point=3, grid=grid)
    model = gs.Graph()
    assert regrid(x, x, Builder(model, Names(model), {})).tensor is tensor
    assert not model.nodes


def test_constants_are_rounded_and_cut() -> None:
    target = Operand(tensor=gs.Variable("t"), scale=0.1, zero_point=3, grid=GRIDS["int16"])
    builder = Builder(gs.Graph(), Names(gs.Graph()), {})
    values = np.array([-np.inf, -0.2, 0.0, 0.449, 1e30], np.float32)
    found = constant_on(values, target, builder, -300, 20)
    assert found.values.tolist() == [-300, 1, 3, 7, 20]
    assert found.values.dtype == np.int16
