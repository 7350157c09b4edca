"""States of LSTM nodes share a grid wherever they are held."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.graph import graph_from_model
from onnx_intq.lowering import Operand
from onnx_intq.recurrent_states import (
    CELL_GRID,
    cell_scale,
    hidden_grid,
    is_cell_grid,
    octaves,
    state_grids,
    state_ranges,
)
from onnx_intq.transform import Range

LAYERS = """
    h0, h1 = Split<axis = 0>(h, two) c0, c1 = Split<axis = 0>(c, two)
    y0, u0, e0 = LSTM<hidden_size = 3>(x, w, r, none, none, h0, c0)
    s0 = Squeeze(y0, one)
    y1, u1, e1 = LSTM<hidden_size = 3>(s0, w, r, none, none, h1, c1)
    z = Concat<axis = 0>(u0, u1) d = Concat<axis = 0>(e0, e1)
    s1 = Squeeze(y1, one) mixed = Concat<axis = 0>(s1, x)"""
QUANTIZED = "q = QuantizeLinear(s0, s, z8)"
HIDDEN = {"h", "h0", "h1", "y0", "u0", "s0", "y1", "u1", "z", "s1"}
CELLS = {"c", "c0", "c1", "e0", "e1", "d"}


def graph(
    body: str = LAYERS,
    results: str = "float[2, 2, 3] z, float[2, 2, 3] d, float mixed",
    **constants: Any,
) -> Any:
    """Two layers of width 3 with states h and c; u and e are their last ones."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[t, 2, 3] x, float[2, 2, 3] h, float[2, 2, 3] c) => ({results})
        <int64[2] two = {{1, 1}}, int64[1] one = {{1}}> {{ {body} }}"""
    )
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "" if name == "none" else name
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    weight = np.ones((1, 12, 3), np.float32)
    for name, values in ({"w": weight, "r": weight} | constants).items():
        stored = np.float32(values) if isinstance(values, float) else np.asarray(values)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(stored), name))
    return graph_from_model(model)


def named(model: gs.Graph, found: dict[int, Any]) -> dict[str, Any]:
    return {name: found[id(t)] for name, t in model.tensors().items() if id(t) in found}


def limits(known: dict[str, Range]) -> Any:
    return lambda name, bits: known.get(f"{name}{bits}")


def test_a_state_has_one_range_wherever_it_is() -> None:
    model = graph()
    found = named(model, state_ranges(model, limits({"y08": (-0.5, 0.25), "u18": (-0.1, 0.75)})))
    assert found == dict.fromkeys(HIDDEN, (-0.5, 0.75))


def test_what_was_never_seen_has_the_range_it_can_have() -> None:
    model = graph()
    assert set(named(model, state_ranges(model, limits({}))).values()) == {(-1.0, 1.0)}


def test_grids() -> None:
    model = graph()
    found = named(model, state_grids(model, limits({"e016": (-2.0, 10.0), "y08": (-0.5, 0.25)})))
    assert set(found) == HIDDEN | CELLS
    assert {(g.scale, g.zero_point, g.grid.dtype.name) for n, g in found.items() if n in CELLS} == {
        (2.0**-12, 0, "int16")
    }
    hidden = {(g.scale, g.zero_point) for n, g in found.items() if n in HIDDEN}
    assert hidden == {(float(np.float32(0.75 / 255)), 170)}


def test_cells_of_unknown_range_are_left_out() -> None:
    model = graph()
    assert set(named(model, state_grids(model, limits({})))) == HIDDEN


def test_layers_that_share_nothing_have_grids_of_their_own() -> None:
    body = """y0, u0, e0 = LSTM<hidden_size = 3>(x, w, r) a = Abs(y0) s = Squeeze(a, one)
        y1 = LSTM<hidden_size = 3>(s, w, r)"""
    model = graph(body, "float y1, float u0, float e0")
    ranges = {"y08": (-0.5, 0.5), "y18": (-0.9, 0.9)}
    assert named(model, state_ranges(model, limits(ranges))) == {
        "y0": (-0.5, 0.5),
        "u0": (-0.5, 0.5),
        "y1": (-0.9, 0.9),
    }


@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 7), ("int8", -121)])
def test_a_hidden_state_that_is_quantized_keeps_its_grid(dtype: str, zero_point: int) -> None:
    results = f"float mixed, {dtype} q, float d"
    model = graph(f"{LAYERS} {QUANTIZED}", results, s=0.125, z8=np.array(zero_point, dtype))
    found = named(model, state_grids(model, limits({"y08": (-0.5, 0.25)})))
    assert {(g.scale, g.zero_point, g.grid.signed) for g in found.values()} == {(0.125, 7, False)}


def test_one_of_16_bits_is_no_hidden_states_grid() -> None:
    model = graph(f"{LAYERS} {QUANTIZED}", "float mixed, int16 q, float d", s=0.125, z8=np.int16(0))
    found = named(model, state_grids(model, limits({})))
    assert {g.scale for g in found.values()} == {float(np.float32(2 / 255))}


@pytest.mark.parametrize(
    ("reach", "expected"), [(0.0, 2), (1.0, 2), (4.0, 2), (4.1, 3), (-17.0, 5), (1e9, 15)]
)
def test_octaves(reach: float, expected: int) -> None:
    assert octaves((min(reach, 0.0), max(reach, 0.0))) == expected
    assert expected == 15 or cell_scale(expected) * 2**15 >= abs(reach)


def test_grids_of_cells() -> None:
    known = Operand(tensor=gs.Variable("c"), scale=2.0**-13, zero_point=0, grid=CELL_GRID)
    assert is_cell_grid(known)
    for scale, zero_point in ((2.0**-14, 0), (2.0, 0), (2.0**-13, 1), (0.0003, 0)):
        other = Operand(tensor=known.tensor, scale=scale, zero_point=zero_point, grid=CELL_GRID)
        assert not is_cell_grid(other)
    assert not is_cell_grid(hidden_grid((-1.0, 1.0), known.tensor))
