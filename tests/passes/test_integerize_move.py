from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import graph_from_model, model_from_graph
from onnx_intq.grid import dyadic, requantize
from onnx_intq.integer_only import prove
from onnx_intq.lowering import GRIDS
from onnx_intq.registry import load
from onnx_intq.runtime import Session
from onnx_intq.transform import Context, run
from onnx_intq.verify import well_formed

IntegerizeMove = load("integerize_move")
RANDOM = np.random.default_rng(0)
XS, YS = np.float32(0.02), np.float32(0.031)
INT64 = np.int64
MASK: Any = np.array([[True, False, True], [False, True, False]])
FIXED: Any = np.array([[-0.5, 0.0, 0.7], [1.1, -9.0, 9.0]], np.float32)
law = settings(max_examples=60, deadline=None)
TYPES = st.sampled_from(sorted(GRIDS))


def graph(inputs: str, body: str, results: Any = "q", **constants: Any) -> gs.Graph:
    """The nodes `body` of a and b, dequantized x and x2; results c, d are quantized to q, q2."""
    pairs = {"q": "q = QuantizeLinear(c, ys, yz)", "q2": "q2 = QuantizeLinear(d, y2s, y2z)"}
    made = [name.strip() for name in results.split(",")]
    dtype = {name: str(constants[f"{name.replace('q', 'y')}z"].dtype) for name in made}
    second = "b = DequantizeLinear(x2, x2s, x2z)" if "x2s" in constants else ""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({inputs}) => ({", ".join(f"{dtype[name]} {name}" for name in made)}) {{
            a = DequantizeLinear(x, xs, xz) {second} {body}
            {" ".join(pairs[name] for name in made)}
        }}"""
    )
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for name, values in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return graph_from_model(model)


def lower(model: gs.Graph) -> list[str]:
    """Lower; doing so again must change nothing. Returns why something remains."""
    ctx = Context(facts={"complete"})
    first, second = run(model, [IntegerizeMove()] * 2, ctx, [well_formed])
    assert second.changes == 0
    assert second.skipped == first.skipped
    assert first.changes + len(first.skipped) == 1
    assert ctx.remaining == ctx.skipped
    return [why for _, why in first.skipped]


def ops(model: gs.Graph) -> list[str]:
    return [node.op for node in model.nodes]


def outputs(model: gs.Graph, **feeds: Any) -> Any:
    results = Session(model_from_graph(model), threads=1).run(feeds)
    return tuple(results.values()) if len(results) > 1 else next(iter(results.values()))


def integers(shape: tuple[int, ...], dtype: str) -> Any:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


def regridded(q: Any, scale: Any, zero: int, y_scale: Any, y_zero: int, y: str) -> Any:
    grid, factor = GRIDS[y], float(scale) / float(y_scale)
    return requantize(
        q.astype(np.int64) - zero,
        dyadic(factor, 62 - grid.bits),
        zero_point=y_zero,
        low=grid.low,
        high=grid.high,
    ).astype(y)


AXES = {"i": np.array([2, 0], INT64), "ends": np.array([3, 4], INT64), "ones": np.ones(2, INT64)}
MOVES: dict[str, tuple[str, tuple[int, ...], Any]] = {
    "Transpose": ("Transpose<perm = [1, 0]>(a)", (3, 4), lambda x: x.T),
    "Reshape": ("Reshape(a, shape)", (3, 4), lambda x: x.reshape(2, 6)),
    "Flatten": ("Flatten(a)", (2, 3, 4), lambda x: x.reshape(2, 12)),
    "Squeeze": ("Squeeze(a, zero)", (1, 4), lambda x: x[0]),
    "Unsqueeze": ("Unsqueeze(a, zero)", (3, 4), lambda x: x[None]),
    "Identity": ("Identity(a)", (3, 4), lambda x: x),
    "Slice": ("Slice(a, one, three)", (5, 2), lambda x: x[1:3]),
    "Gather": ("Gather<axis = 1>(a, pick)", (2, 5), lambda x: x[:, [2, 0]]),
    "GatherElements": (
        "GatherElements<axis = 0>(a, picks)",
        (2, 2),
        lambda x: x[[1, 0], [0, 1]][None],
    ),
    "GatherND": ("GatherND(a, picks)", (2, 2), lambda x: x[[1], [0]]),
    "Expand": ("Expand(a, shape)", (2, 1), lambda x: np.broadcast_to(x, (2, 6))),
    "Tile": ("Tile(a, shape)", (3, 2), lambda x: np.tile(x, (2, 6))),
    "ReduceMax": ("ReduceMax<keepdims = 0>(a, one)", (3, 4), lambda x: x.max(axis=1)),
    "ReduceMin": ("ReduceMin(a, zero)", (3, 4), lambda x: x.min(axis=0, keepdims=True)),
    "GlobalMaxPool": (
        "GlobalMaxPool(a)",
        (2, 3, 4, 5),
        lambda x: x.max(axis=(2, 3), keepdims=True),
    ),
    "MaxPool": (
        "MaxPool<kernel_shape = [2], strides = [2]>(a)",
        (2, 3, 7),
        lambda x: x[:, :, :6].reshape(2, 3, 3, 2).max(axis=3),
    ),
    "Pad": ('Pad<mode = "edge">(a, pads)', (3, 4), lambda x: np.pad(x, ((1, 0), (0, 2)), "edge")),
}
INDICES = {
    "shape": np.array([2, 6], INT64),
    "zero": np.array([0], INT64),
    "one": np.array([1], INT64),
    "three": np.array([3], INT64),
    "pick": np.array([2, 0], INT64),
    "picks": np.array([[1, 0]], INT64),
    "pads": np.array([1, 0, 0, 2], INT64),
}


@law
@given(st.sampled_from(sorted(MOVES)), TYPES, TYPES, st.booleans(), st.data())
def test_moves_work_on_the_integers(
    op: str, x_type: str, y: str, same_scale: bool, data: st.DataObject
) -> None:
    body, shape, move = MOVES[op]
    xz, yz = (data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for t in (x_type, y))
    ys = XS if same_scale else YS
    zeros = {"xz": np.asarray(xz, x_type), "yz": np.asarray(yz, y)}
    used = {name: v for name, v in INDICES.items() if name in body.replace("kernel_shape", "")}
    dims = ", ".join(map(str, shape))
    model = graph(f"{x_type}[{dims}] x", f"c = {body}", xs=XS, ys=ys, **zeros, **used)
    assert lower(model) == []
    assert prove(model) == []
    x = integers(shape, x_type)
    expected = move(regridded(x, XS, xz, ys, yz, y))
    np.testing.assert_array_equal(outputs(model, x=x), expected)


@pytest.mark.parametrize("op", MOVES)
def test_one_grid_needs_one_node(op: str) -> None:
    body, shape, move = MOVES[op]
    used = {name: v for name, v in INDICES.items() if name in body.replace("kernel_shape", "")}
    dims, zeros = ", ".join(map(str, shape)), {"xz": np.int8(3), "yz": np.int8(3)}
    model = graph(f"int8[{dims}] x", f"c = {body}", xs=XS, ys=XS, **zeros, **used)
    assert lower(model) == []
    assert ops(model) == ["ReduceMax" if op == "GlobalMaxPool" else op]
    x = integers(shape, "int8")
    np.testing.assert_array_equal(outputs(model, x=x), move(x))


JOINS: dict[str, tuple[str, Any]] = {
    "Concat": ("Concat<axis = 1>(a, f, b)", lambda a, f, b: np.concatenate([a, f, b], axis=1)),
    "Where": ("Where(mask, a, b)", lambda a, f, b: np.where(MASK, a, b)),
    "Where constant": ("Where(mask, f, b)", lambda a, f, b: np.where(MASK, f, b)),
    "Max": ("Max(a, f, b)", lambda a, f, b: np.maximum(np.maximum(a, f), b)),
    "Min": ("Min(a, f, b)", lambda a, f, b: np.minimum(np.minimum(a, f), b)),
}


@law
@given(st.sampled_from(sorted(JOINS)), TYPES, TYPES, TYPES, st.data())
def test_joins_bring_all_on_the_result_s_grid(
    join: str, x_type: str, x2_type: str, y: str, data: st.DataObject
) -> None:
    body, function = JOINS[join]
    types = {"x": x_type, "x2": x2_type, "y": y}
    zero = {n: data.draw(st.integers(np.iinfo(t).min, np.iinfo(t).max)) for n, t in types.items()}
    scale = {n: np.float32(data.draw(st.sampled_from([0.01, 0.02, 0.031]))) for n in types}
    given_ = {f"{n}z": np.asarray(zero[n], types[n]) for n in types}
    given_ |= {f"{n}s": np.asarray(scale[n]) for n in types} | {"f": FIXED}
    given_ |= {"mask": MASK} if "mask" in body else {}
    inputs = f"{x_type}[2, 3] x, {x2_type}[2, 3] x2"
    model = graph(inputs, f"c = {body}", **given_)
    assert lower(model) == []
    assert prove(model) == []
    x, x2 = integers((2, 3), x_type), integers((2, 3), x2_type)
    a, b = (
        regridded(q, scale[n], zero[n], scale["y"], zero["y"], y) for n, q in (("x", x), ("x2", x2))
    )
    f = np.rint(FIXED / scale["y"].astype(float)) + zero["y"]
    f = np.clip(f, np.iinfo(y).min, np.iinfo(y).max).astype(y)
    read = {name: q for name, q in (("x", x), ("x2", x2)) if name in {t.name for t in model.inputs}}
    np.testing.assert_array_equal(outputs(model, **read), function(a, f, b))


def test_a_mask_on_one_grid_is_one_node() -> None:
    zeros = {"xz": np.int8(-20), "yz": np.int8(-20), "f": np.float32(0)}
    model = graph("int8[n, 3, t] x, bool[n, 1, t] m", "c = Where(m, a, f)", xs=XS, ys=XS, **zeros)
    assert lower(model) == []
    assert ops(model) == ["Where"]
    x, m = integers((2, 3, 5), "int8"), RANDOM.random((2, 1, 5)) > 0.5
    np.testing.assert_array_equal(outputs(model, x=x, m=m), np.where(m, x, np.int8(-20)))


@pytest.mark.parametrize("y", GRIDS)
@pytest.mark.parametrize(("body", "fill"), [("Pad(a, pads)", 0.0), ("Pad(a, pads, fill)", -0.4)])
def test_padding_is_real_zero_or_its_constant(y: str, body: str, fill: float) -> None:
    given_ = {"xz": np.asarray(7, y), "yz": np.asarray(7, y), "fill": np.float32(fill)}
    model = graph(f"{y}[3, 4] x", f"c = {body}", xs=XS, ys=XS, pads=INDICES["pads"], **given_)
    assert lower(model) == []
    assert ops(model) == (["Pad"] if "8" in y else ["Cast", "Pad", "Cast"])
    integer = max(7 + round(fill / float(XS)), np.iinfo(y).min)
    x = integers((3, 4), y)
    padded = np.pad(x, ((1, 0), (0, 2)), constant_values=integer)
    np.testing.assert_array_equal(outputs(model, x=x), padded)


def test_padding_of_named_axes() -> None:
    given_ = {
        "xz": np.int8(7),
        "yz": np.int8(7),
        "pads": np.array([0, 2], INT64),
        "axes": np.array([1], INT64),
    }
    model = graph("int8[3, 4] x", "c = Pad(a, pads, , axes)", xs=XS, ys=XS, **given_)
    assert lower(model) == []
    x = integers((3, 4), "int8")
    padded = np.pad(x, ((0, 0), (0, 2)), constant_values=7)
    np.testing.assert_array_equal(outputs(model, x=x), padded)


SPLITS = ["Split<axis = 1, num_outputs = 2>(a)", "Split<axis = 1>(a, sizes)"]


@pytest.mark.parametrize("body", SPLITS)
@pytest.mark.parametrize("second", [XS, YS])
def test_a_split_stays_one_node(body: str, second: Any) -> None:
    """GLU splits its input; each part may have a grid of its own."""
    given_ = {"xz": np.int8(3), "yz": np.int8(3), "y2s": second, "y2z": np.int8(3)}
    given_ |= {"sizes": np.array([3, 3], INT64)} if "sizes" in body else {}
    model = graph("int8[n, 6] x", f"c, d = {body}", "q, q2", xs=XS, ys=XS, **given_)
    assert lower(model) == []
    assert prove(model) == []
    assert ops(model).count("Split") == 1
    assert (ops(model) == ["Split"]) == (second == XS)
    x = integers((4, 6), "int8")
    left, right = outputs(model, x=x)
    np.testing.assert_array_equal(left, x[:, :3])
    np.testing.assert_array_equal(right, regridded(x[:, 3:], XS, 3, second, 3, "int8"))


def test_parts_that_nobody_reads_may_stay_unquantized() -> None:
    given_ = {"xz": np.int8(3), "y2s": XS, "y2z": np.int8(3)}
    model = graph("int8[n, 6] x", f"c, d = {SPLITS[0]}", "q2", xs=XS, **given_)
    assert lower(model) == []
    x = integers((4, 6), "int8")
    np.testing.assert_array_equal(outputs(model, x=x), x[:, 3:])


def test_constants_are_moved_as_integers() -> None:
    """An embedding: token numbers pick rows of a constant."""
    table = RANDOM.standard_normal((9, 4)).astype(np.float32)
    given_ = {"table": table, "yz": np.int8(-3)}
    model = graph(
        "int8[1] x, int64[t] tokens",
        "c = Gather(table, tokens)",
        xs=XS,
        xz=np.int8(0),
        ys=YS,
        **given_,
    )
    assert lower(model) == []
    assert prove(model) == []
    assert ops(model) == ["Gather"]
    tokens = np.array([0, 8, 3], INT64)
    expected = np.clip(np.rint(table[tokens] / YS) - 3, -128, 127)
    np.testing.assert_array_equal(outputs(model, x=np.zeros(1, np.int8), tokens=tokens), expected)


@pytest.mark.parametrize("y", GRIDS)
@pytest.mark.parametrize("ys", [XS, YS])
@pytest.mark.parametrize(
    ("move", "function"), [("MaxPool<kernel_shape = [2]>(a)", "pool"), ("Max(a, f)", "max")]
)
def test_an_activation_limits_the_integers(y: str, ys: Any, move: str, function: str) -> None:
    zeros = {"xz": np.asarray(50, y), "yz": np.asarray(50, y)}
    limits = {"low": np.float32(-0.2), "high": np.float32(0.6)}
    given_ = limits | {"f": np.float32(-0.1)} if function == "max" else limits
    body = f"m = {move} c = Clip(m, low, high)"
    model = graph(f"{y}[2, 3, 9] x", body, xs=XS, ys=ys, **zeros, **given_)
    assert lower(model) == []
    assert prove(model) == []
    x = integers((2, 3, 9), y)
    q = regridded(x, XS, 50, ys, 50, y)
    f = np.asarray(50 + np.rint(-0.1 / ys), y)
    moved = np.maximum(q[..., 1:], q[..., :-1]) if function == "pool" else np.maximum(q, f)
    ends = np.rint(np.array([-0.2, 0.6]) / ys) + 50
    np.testing.assert_array_equal(outputs(model, x=x), np.clip(moved, *ends))


POOLS = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(0, 1)
)


@law
@given(
    st.lists(POOLS, min_size=1, max_size=2),
    TYPES,
    st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.booleans(),
)
def test_maxima_of_windows(axes: list[Any], y: str, mode: str, dynamic: bool) -> None:
    """16 bits against 8: the slices choose what onnxruntime's MaxPool chooses in float."""
    kernel, strides, dilations, begin, end = (list(v) for v in zip(*axes, strict=True))
    pads = [min(p, k - 1) for p, k in zip(begin, kernel, strict=True)]
    pads += [min(p, k - 1) for p, k in zip(end, kernel, strict=True)]
    if mode.startswith("SAME"):
        dilations = [1] * len(axes)  # others are declined
        strides = [1 if dynamic or k < s else s for k, s in zip(kernel, strides, strict=True)]
    padding = f'auto_pad = "{mode}"' if mode else f"pads = {pads}"
    text = (
        f"MaxPool<kernel_shape = {kernel}, strides = {strides}, dilations = {dilations}, {padding}>"
    )
    sizes = [7, 6][: len(axes)]
    dims = ", ".join(["2, 3", *(["h", "w"][: len(axes)] if dynamic else map(str, sizes))])
    zeros = {"xz": np.asarray(3, y), "yz": np.asarray(3, y)}
    model = graph(f"{y}[{dims}] x", f"c = {text}(a)", xs=XS, ys=XS, **zeros)
    before = graph(f"{y}[{dims}] x", f"c = {text}(a)", xs=XS, ys=XS, **zeros)
    assert lower(model) == []
    assert prove(model) == []
    x = integers((2, 3, *sizes), y)
    np.testing.assert_array_equal(outputs(model, x=x), outputs(before, x=x))


def test_sizes_are_those_of_the_integers() -> None:
    zeros = {"xz": np.int8(3), "yz": np.int8(3)}
    body = "s = Shape(a) n = Size(a) c = Identity(a)"
    model = graph("int8[n, 3] x", body, xs=XS, ys=XS, **zeros)
    model.outputs += [model.tensors()[name] for name in ("s", "n")]
    reports = run(model, [IntegerizeMove()] * 2, Context(facts={"complete"}), [well_formed])
    assert [report.changes for report in reports] == [3, 0]
    assert prove(model) == []
    _, shape, size = outputs(model, x=np.zeros((2, 3), np.int8))
    assert (shape.tolist(), size.item()) == ([2, 3], 6)


def test_declines_the_size_of_a_float_tensor() -> None:
    zeros = {"xz": np.int8(3), "yz": np.int8(3)}
    model = graph("int8[n, 3] x, float[t] f", "s = Shape(f) c = Relu(a)", xs=XS, ys=XS, **zeros)
    model.outputs.append(model.tensors()["s"])
    (why,) = lower(model)
    assert why.startswith("it asks for the size of a float tensor")


DECLINED: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "int16[1, 4, 2, 2] x",
        "c = DepthToSpace<blocksize = 2>(a)",
        {},
        "onnxruntime has no DepthToSpace",
    ),
    (
        "int16[1, 4, t] x",
        "c = MaxPool<kernel_shape = [2], ceil_mode = 1>(a)",
        {},
        "it rounds the size",
    ),
    (
        "int16[1, 4, t] x",
        'c = MaxPool<kernel_shape = [3], strides = [2], auto_pad = "SAME_UPPER">(a)',
        {},
        "its padding (auto_pad) depends on a length that is not fixed",
    ),
    (
        "int16[1, 4, t] x",
        'c = MaxPool<kernel_shape = [3], dilations = [2], auto_pad = "SAME_UPPER">(a)',
        {},
        "it has auto_pad with dilations",
    ),
    ("int16[2, 2] x, float[2, 2] f", "c = Max(a, f)", {}, "its input 'f' is not quantized"),
    ("int16[2] x, float f", "c = Pad(a, pads, f)", {"pads": np.array([1, 1])}, "what it pads with"),
]


@pytest.mark.parametrize(("inputs", "body", "constants", "why"), DECLINED)
def test_declines_with_the_reason(
    inputs: str, body: str, constants: dict[str, Any], why: str
) -> None:
    model = graph(inputs, body, xs=XS, ys=XS, xz=np.int16(0), yz=np.int16(0), **constants)
    before = len(model.nodes)
    (found,) = lower(model)
    assert found.startswith(why)
    assert len(model.nodes) == before


def test_declines_an_unknown_rank_and_indices_that_are_read() -> None:
    zeros = {"xs": XS, "ys": XS, "xz": np.int8(0), "yz": np.int8(0)}
    model, ctx = graph("int8[2, 3, 4] x", "c = GlobalMaxPool(a)", **zeros), Context()
    model.tensors()["a"].shape = None
    assert IntegerizeMove().run(model, ctx) == 0
    assert [why for _, why in ctx.remaining] == ["the rank of its input 'a' is unknown"]
    model = graph("int8[2, 3, 4] x", "c, i = MaxPool<kernel_shape = [2]>(a)", **zeros)
    model.outputs.append(model.tensors()["i"])
    (why,) = lower(model)
    assert why.startswith("its result is not quantized once")
