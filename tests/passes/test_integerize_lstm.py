"""LSTM layers in integers: bit for bit the kernel's reference, with a Scan and without."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.integer_only import prove
from onnx_intq.interpreter import differences
from onnx_intq.intervals import bounds
from onnx_intq.kernels.exponential import Mode
from onnx_intq.kernels.lstm import Cell, Gates, unrolled
from onnx_intq.registry import parse
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, IntqError, run
from onnx_intq.verify import well_formed

law = settings(max_examples=30, deadline=None)
XS, HS, CS = np.float32(0.02), np.float32(0.007), np.float32(2.0**-12)
XZ, HZ = 100, 120
INPUTS, WIDTH = 5, 4
STATES = ("h", "c")
LAYER = "LSTM<hidden_size = 4{options}>(a, b, d, bias, none{starts})"
"""Of the dequantized x, w and r."""


def weights(seed: int, directions: int = 1) -> dict[str, Any]:
    """Stored weights with a scale per row, and a bias."""
    random = np.random.default_rng(seed)
    rows, largest = 4 * WIDTH, 127
    found = {
        name: random.integers(-largest, largest + 1, (directions, rows, columns)).astype(np.int8)
        for name, columns in (("w", INPUTS), ("r", WIDTH))
    }
    scales = {f"{name}s": random.uniform(0.002, 0.02, rows).astype(np.float32) for name in found}
    bias = random.uniform(-1, 1, (directions, 2 * rows)).astype(np.float32)
    return found | scales | {"bias": bias}


def graph(
    constants: dict[str, Any],
    shape: str = "time, batch",
    options: str = "",
    *,
    states: bool = True,
    x: str = "uint8",
    made: str = "y, z, e",
    **changed: Any,
) -> gs.Graph:
    """An LSTM of dequantized x, h, c, whose results y, z, e are quantized to q, qh, qc."""
    directions = len(constants["w"])
    starts = f", uint8[{directions}, batch, 4] h, int16[{directions}, batch, 4] c" if states else ""
    body = LAYER.format(options=options, starts=", i, j" if states else "")
    results = {"y": "uint8 q", "z": "uint8 qh", "e": "int16 qc"}
    pairs = {"y": "hs, hz", "z": "hs, hz", "e": "cs, cz"}
    names = made.split(", ")
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g ({x}[{shape}, {INPUTS}] x{starts})
        => ({", ".join(results[n] for n in names)}) {{
            a = DequantizeLinear(x, xs, xz)
            b = DequantizeLinear<axis = 1>(w, ws) d = DequantizeLinear<axis = 1>(r, rs)
            {"i = DequantizeLinear(h, hs, hz) j = DequantizeLinear(c, cs, cz)" if states else ""}
            {", ".join(["y", "z", "e"])} = {body}
            {" ".join(f"{results[n].split()[1]} = QuantizeLinear({n}, {pairs[n]})" for n in names)}
        }}"""
    )
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "" if name == "none" else name
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    fixed = {"xs": XS, "hs": HS, "cs": CS, "xz": np.array(XZ, x), "hz": np.uint8(HZ)}
    for name, values in (fixed | {"cz": np.int16(0)} | constants | changed).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph, options: str = "") -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    spec = parse(f"integerize_lstm({options})")[0]
    first, second = run(model, [spec, spec], ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped == first.remaining
    assert first.changes + len(first.skipped) == 1
    return [why for _, why in first.skipped]


def lowered(*arguments: Any, lowering: str = "", **options: Any) -> gs.Graph:
    model = graph(*arguments, **options)
    assert lower(model, lowering) == []
    assert prove(model) == []
    assert bounds(model).risks == ()
    return model


def outputs(model: gs.Graph, **feeds: Any) -> dict[str, Any]:
    found: dict[str, Any] = Session(model_from_graph(model), threads=1).run(feeds)
    assert differences(model, feeds) == []
    return found


def reference(
    constants: dict[str, Any], x: Any, h: Any, c: Any, mode: Mode = "poly", *, number: int = 0
) -> tuple[Any, Any, Any]:
    """One direction by `kernels.lstm.unrolled`."""
    w, r = (constants[name][number].astype(np.int64) for name in "wr")
    steps = [s * constants[n].astype(np.float64) for s, n in ((float(XS), "ws"), (float(HS), "rs"))]
    bias = constants["bias"][number].astype(np.float64).reshape(2, -1).sum(axis=0)
    centred = x.astype(np.int64) - XZ
    reach = [_reach(w, -XZ, 255 - XZ), _reach(r, -HZ, 255 - HZ)]
    gates = Gates.of(steps[0], steps[1], bias, (reach[0], reach[1]))
    limits = {"zero_point": HZ, "low": 0, "high": 255}
    cell = Cell(gates=gates, octaves=3, scale=float(HS), mode=mode, **limits)
    start = h[number].astype(np.int64), c[number].astype(np.int64)
    return unrolled(gates.of_input(centred @ w.T), r, *start, cell)


def _reach(w: Any, low: int, high: int) -> int:
    return int(np.maximum(w * low, w * high).sum(axis=1).max())


def draw(seed: int, time: int, batch: int, directions: int = 1) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    state = directions, batch, WIDTH
    x = random.integers(0, 256, (time, batch, INPUTS)).astype(np.uint8)
    h = random.integers(0, 256, state).astype(np.uint8)
    return x, h, random.integers(-(1 << 15), 1 << 15, state).astype(np.int16)


@law
@given(
    seed=st.integers(0, 99),
    time=st.integers(1, 6),
    batch=st.integers(1, 3),
    mode=st.sampled_from(["poly", "paper", "lut"]),
    cpu=st.sampled_from(["any", "vnni"]),
    static=st.booleans(),
)
def test_it_equals_the_kernel(
    seed: int, time: int, batch: int, mode: Mode, cpu: str, *, static: bool
) -> None:
    constants, (x, h, c) = weights(seed), draw(seed, time, batch)
    shape = f"{time}, batch" if static else "time, batch"
    model = lowered(constants, shape, lowering=f"mode={mode!r}, cpu={cpu!r}")
    scans = [node for node in model.nodes if node.op == "Scan"]
    assert len(scans) == (not static or time > 1)
    found = outputs(model, x=x, h=h, c=c)
    states, last_h, last_c = reference(constants, x, h, c, mode)
    assert np.array_equal(found["q"][:, 0], states)
    assert np.array_equal(found["qh"][0], last_h)
    assert np.array_equal(found["qc"][0], last_c)


def test_a_state_fed_back_goes_on_as_if_never_cut() -> None:
    model = lowered(weights(0))
    x, h, c = draw(0, 40, 2)
    whole, parts = outputs(model, x=x, h=h, c=c), []
    for start in range(0, 40, 7):
        found = outputs(model, x=x[start : start + 7], h=h, c=c)
        h, c = found["qh"], found["qc"]
        parts.append(found["q"])
    assert np.array_equal(np.concatenate(parts), whole["q"])
    assert np.array_equal(h, whole["qh"])
    assert np.array_equal(c, whole["qc"])


def test_reverse_is_forward_on_what_is_reversed() -> None:
    x, h, c = draw(1, 5, 2)
    forward = outputs(lowered(weights(1)), x=x[::-1].copy(), h=h, c=c)
    model = lowered(weights(1), options=', direction = "reverse"')
    found = outputs(model, x=x, h=h, c=c)
    assert np.array_equal(found["q"][::-1], forward["q"])
    assert np.array_equal(found["qc"], forward["qc"])


@pytest.mark.parametrize("shape", ["time, batch", "1, batch"])
def test_both_directions(shape: str) -> None:
    constants = weights(2, directions=2)
    x, h, c = draw(2, 1 if shape[0] == "1" else 5, 2, directions=2)
    model = lowered(constants, shape, ', direction = "bidirectional"')
    found = outputs(model, x=x, h=h, c=c)
    ahead = reference(constants, x, h, c)
    back = reference(constants, x[::-1], h, c, number=1)
    assert np.array_equal(found["q"], np.stack([ahead[0], back[0][::-1]], axis=1))
    assert np.array_equal(found["qh"], np.stack([ahead[1], back[1]]))
    assert np.array_equal(found["qc"], np.stack([ahead[2], back[2]]))


@pytest.mark.parametrize("shape", ["time, batch", "1, batch", "time, 2"])
def test_without_states_it_starts_at_zero(shape: str) -> None:
    x, h, c = draw(3, 1 if shape[0] == "1" else 5, 2)
    found = outputs(lowered(weights(3), shape, states=False, made="y"), x=x)
    start = np.full_like(h, HZ), np.zeros_like(c)
    want = reference(weights(3), x, *start)[0]
    # Nothing tells the cell's range: it has another scale than the reference's.
    assert np.abs(found["q"][:, 0].astype(int) - want).max() <= 1


def test_states_may_be_constant() -> None:
    x, h, c = draw(4, 3, 1)
    real = {"i": (h - np.float32(HZ)) * HS, "j": c * CS}
    model = graph(weights(4), "time, 1")
    for tensor in model.nodes[3].outputs + model.nodes[4].outputs:
        values = real[tensor.name].astype(np.float32)
        tensor.inputs.clear()
        tensor.to_constant(values)
    model.inputs = model.inputs[:1]
    model.cleanup()
    assert lower(model) == []
    found = outputs(model, x=x)
    assert np.array_equal(found["q"][:, 0], reference(weights(4), x, h, c)[0])


def test_a_cell_on_another_grid_is_requantised_on_its_way() -> None:
    x, h, c = draw(5, 4, 2)
    coarse = np.float32(0.001)
    model = lowered(weights(5), cs=coarse)
    found = outputs(model, x=x, h=h, c=c)
    # -32.8 .. 32.8: the next power of two is 64, whose steps are twice as large.
    inner = np.clip(np.rint(c * float(coarse) * 2**12), -(1 << 15), (1 << 15) - 1)
    near = reference(weights(5), x, h, inner.astype(np.int16))[1]
    kept = np.abs(c.astype(float) * float(coarse)) < 7  # what the reference can hold
    difference = np.abs(found["qh"][0].astype(int) - near)
    assert difference[kept[0]].max() <= 8


@pytest.mark.parametrize("x", ["int8", "int16", "uint16"])
def test_other_types_of_x(x: str) -> None:
    """16 bits are multiplied byte by byte; more of them, with a smaller step, are nearer."""
    constants, (q, h, c) = weights(6), draw(6, 4, 2)
    wide = np.dtype(x).itemsize > 1
    steps = (q.astype(np.int64) - XZ) * (256 if wide else 1)
    scale, zero = XS / 256 if wide else XS, 500 if wide else -5
    info = np.iinfo(x)
    stored = np.clip(steps + zero, info.min, info.max)
    model = lowered(constants, x=x, xs=np.float32(scale), xz=np.array(zero, x))
    found = outputs(model, x=stored.astype(x), h=h, c=c)
    kept = (stored - zero) // (256 if wide else 1) + XZ
    assert np.array_equal(found["q"][:, 0], reference(constants, kept, h, c)[0])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"options": ", clip = 3.0"}, "it clips its gates"),
        ({"options": ", input_forget = 1"}, "its forget gate is coupled"),
        ({"options": ", layout = 1"}, "its input has the batch first"),
        ({"options": ', activations = ["Relu", "Tanh", "Tanh"]'}, "its activations are"),
    ],
)
def test_options_without_integer_form(changed: dict[str, Any], why: str) -> None:
    model = graph(weights(0))
    (node,) = [n for n in model.nodes if n.op == "LSTM"]
    name, _, value = changed["options"].strip(", ").partition(" = ")
    node.attrs[name] = eval(value)
    assert lower_without_check(model)[0].startswith(why)


def lower_without_check(model: gs.Graph) -> list[str]:
    ctx = Context(facts={"complete"})
    assert run(model, parse("integerize_lstm"), ctx)[0].changes == 0
    return [why for _, why in ctx.remaining]


@pytest.mark.parametrize(
    ("index", "why"), [(4, "it takes the lengths"), (7, "it has peepholes"), (3, "its bias is")]
)
def test_inputs_without_integer_form(index: int, why: str) -> None:
    model = graph(weights(0))
    (node,) = [n for n in model.nodes if n.op == "LSTM"]
    more = gs.Variable("more", np.float32)
    model.inputs.append(more)
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = more
    assert lower_without_check(model)[0].startswith(why)


def test_weights_must_have_scales_per_row() -> None:
    constants = weights(0) | {"ws": np.full(INPUTS, 0.01, np.float32)}
    model = graph(constants)
    (dequantizer,) = [n for n in model.nodes if n.outputs[0].name == "b"]
    dequantizer.attrs["axis"] = 2
    assert lower(model) == ["its weight has scales along the axis that is summed"]
    model = graph(weights(0) | {"ws": np.float32(0.01)})
    assert lower(model) == []
    model = graph(weights(0) | {"ws": np.array([0.01], np.float32)})
    assert lower(model) == []


def test_each_direction_may_have_one_scale() -> None:
    constants = weights(7, directions=2)
    scales = np.array([0.01, 0.02], np.float32)
    model = graph(constants | {"ws": scales, "rs": scales}, options=', direction = "bidirectional"')
    for node in model.nodes:
        if node.outputs[0].name in "bd":
            node.attrs["axis"] = 0
    assert lower(model) == []
    x, h, c = draw(7, 3, 1, directions=2)
    found = outputs(model, x=x, h=h, c=c)
    for number, scale in enumerate(scales):
        rows = {name: np.full(4 * WIDTH, scale) for name in ("ws", "rs")}
        turned = x[::-1] if number else x
        want = reference(constants | rows, turned, h, c, number=number)[1]
        assert np.array_equal(found["qh"][number], want)


def test_a_hidden_state_that_nobody_sees_lies_within_its_bounds() -> None:
    """Only the cell is read: the hidden state gets a grid for -1 .. 1."""
    x, h, c = draw(8, 3, 2)
    found = outputs(lowered(weights(8), states=False, made="e"), x=x)
    want = reference(weights(8), x, np.full_like(h, HZ), np.zeros_like(c))[2]
    assert 0 < np.abs(found["qc"][0] - want).max() < 200  # steps of 2^-12


def test_an_unknown_rank() -> None:
    model = graph(weights(0))
    for tensor in (model.inputs[0], model.nodes[0].outputs[0]):
        tensor.shape = None
    assert lower_without_check(model) == ["the rank of its input 'x' is unknown"]


@pytest.mark.parametrize(("option", "found"), [("cpu='arm'", "cpu 'arm'"), ("mode='best'", "best")])
def test_options(option: str, found: str) -> None:
    with pytest.raises(IntqError, match=found):
        lower(graph(weights(0)), option)
