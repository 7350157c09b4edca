import numpy as np
import onnx
import pytest

from onnx_intq.channels import Group, groups
from onnx_intq.graph import graph_from_model
from onnx_intq.grid import Grid
from onnx_intq.smoothing import Grids, Samples, choose, collect

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 12, 8] x) => (float[1, 12, 8] y)
    <int64[4] heads = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}> {
        q0 = MatMul(x, wq)
        q1 = Reshape(q0, heads)
        q = Transpose<perm = [0, 2, 1, 3]>(q1)
        k0 = MatMul(x, wk)
        k1 = Reshape(k0, heads)
        k = Transpose<perm = [0, 2, 3, 1]>(k1)
        v0 = MatMul(x, wv)
        v1 = Reshape(v0, heads)
        v = Transpose<perm = [0, 2, 1, 3]>(v1)
        a = MatMul(q, k)
        p = Softmax(a)
        c0 = MatMul(p, v)
        c1 = Transpose<perm = [0, 2, 1, 3]>(c0)
        c = Reshape(c1, flat)
        y = MatMul(c, wo)
    }"""
LOUD = np.array([32, 1, 1, 1, 1, 1, 1, 1], np.float32)


@pytest.fixture
def attention() -> tuple[list[Group], Samples]:
    """Attention whose first query channel is loud and key channel quiet, and so for values."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, factor in (
        ("wq", LOUD), ("wk", 1 / LOUD), ("wv", LOUD), ("wo", 1 / LOUD[:, None]),
    ):  # fmt: skip
        values = (random.standard_normal((8, 8)) * factor).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    feeds = [{"x": random.standard_normal((1, 12, 8)).astype(np.float32)} for _ in range(5)]
    graph = graph_from_model(model)
    found = [group for _, group in groups(graph) if not isinstance(group, str)]
    return found, collect(graph, found, feeds)


def test_samples_are_rows_of_what_is_read(attention: tuple[list[Group], Samples]) -> None:
    _, samples = attention
    assert samples.rows.keys() == {"c"}
    assert samples.rows["c"].shape == (60, 8)
    assert sorted(len(pairs) for pairs in samples.pairs.values()) == [2, 2]
    for pairs in samples.pairs.values():
        assert all(a.shape[-1] == b.shape[-2] for a, b in pairs)


def test_loud_channels_are_made_quieter(attention: tuple[list[Group], Samples]) -> None:
    found, samples = attention
    grids = Grids(shift=0.0)
    assert len(found) == 2
    for group in found:
        factors, ratio = choose(group, samples, grids)
        assert ratio < 0.5
        assert factors is not None
        assert factors.shape == (8,)
        assert factors[0] == factors.min()


def test_the_more_other_data_may_differ_the_less_is_done(
    attention: tuple[list[Group], Samples],
) -> None:
    found, samples = attention
    ratios = [choose(found[0], samples, Grids(shift=shift))[1] for shift in (0.0, 0.5, 3.0)]
    assert ratios[0] < ratios[1] <= ratios[2]


def test_values_are_rounded_as_grid_does_it() -> None:
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    for signed in (False, True):
        grids = Grids(activation=Grid(8, signed=signed))
        rounded = grids.round(x, x)
        steps = np.unique(rounded)
        assert len(steps) <= 256
        assert np.abs(rounded - x).mean() < np.abs(x).max() / 256
        np.testing.assert_array_equal(grids.round(rounded, x), rounded)
    assert (Grids(shift=0.0).shifted(x) == x).all()


@pytest.mark.parametrize("behind", ["r = Relu(d) y = Conv(r, wo)", "y = Softmax(d)"])
def test_grouped_convolutions_count_what_reads_them(behind: str) -> None:
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 8, 12] x) => (float[n, 8, 12] y)
        {{ a = Conv(x, wa) b = Relu(a) d = Conv<group = 8>(b, wd) {behind} }}"""
    )
    loud = LOUD[:, None, None]
    for name, values in (
        ("wa", random.standard_normal((8, 8, 1)) * loud),
        ("wd", random.standard_normal((8, 1, 1)) / loud),
        ("wo", random.standard_normal((8, 8, 1))),
    ):
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        if name != "wo" or "wo" in behind:
            model.graph.initializer.append(tensor)
    feeds = [{"x": random.standard_normal((3, 8, 12)).astype(np.float32)}]
    graph = graph_from_model(model)
    found = [group for _, group in groups(graph) if isinstance(group, Group)]
    first = next(group for group in found if "b" in group.tensors)
    factors, ratio = choose(first, collect(graph, found, feeds), Grids(weight_bits=4, shift=0.0))
    assert factors is not None
    assert factors[0] == factors.min()
    assert ratio < 0.5
