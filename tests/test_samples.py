import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model
from onnx_intq.samples import Sampler, specs

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def graph(signature: str, body: str) -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(f"{HEADER} g {signature} {{ {body} }}"))


def cut(signature: str, body: str, *batches: Batch) -> list[list[int]]:
    """For each batch, the lengths of the first axes of what it is cut into."""
    sampler = Sampler(graph(signature, body), threads=1)
    return [
        [len(values) if values.ndim else 0 for s in sampler.samples(b) for values in s.values()]
        for b in batches
    ]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_batches_are_cut_where_samples_are_independent() -> None:
    signature = "(float[b, 3, t] x, float[b] gain) => (float[b, 3, t] y)"
    body = "axes = Constant<value_ints: ints = [1, 2]>() g = Unsqueeze(gain, axes) y = Mul(x, g)"
    batch = {"x": random(3, 3, 5), "gain": random(3)}
    assert cut(signature, body, batch, {"x": random(1, 3, 4), "gain": random(1)}) == [
        [1, 1] * 3,
        [1, 1],
    ]


def test_samples_are_the_rows_of_the_batch_in_order() -> None:
    sampler = Sampler(graph("(float[b, 3] x) => (float[b, 3] y)", "y = Relu(x)"), threads=1)
    batch = {"x": random(4, 3)}
    found = np.concatenate([sample["x"] for sample in sampler.samples(batch)])
    np.testing.assert_array_equal(found, batch["x"])


@pytest.mark.parametrize(
    "body",
    [
        "axis = Constant<value_int: int = 0>() y = CumSum(x, axis)",  # mixes along it, as time does
        "m = ReduceMean<axes: ints = [0], keepdims: int = 1>(x) y = Sub(x, m)",
        "y = Transpose(x)",  # the batch moves to another axis
    ],
)
def test_a_first_axis_that_is_mixed_along_is_left_whole(body: str) -> None:
    batch = {"x": random(3, 3)}
    assert cut("(float[t, f] x) => (float[p, q] y)", body, batch, batch) == [[3], [3]]


@pytest.mark.parametrize(
    ("signature", "body", "batch"),
    [
        ("(float[3, t] x) => (float[3, t] y)", "y = Relu(x)", {"x": random(3, 4)}),
        (
            "(float[b, 2] x, float[c, 2] z) => (float[d, 2] y)",
            "y = Concat<axis: int = 0>(x, z)",
            {"x": random(3, 2), "z": random(2, 2)},
        ),
        (
            "(float[b, 2] x, float z) => (float[b, 2] y)",
            "y = Mul(x, z)",
            {"x": random(3, 2), "z": random()},
        ),
    ],
    ids=["fixed", "unequal", "scalar"],
)
def test_inputs_without_a_common_dynamic_first_axis_are_left_whole(
    signature: str, body: str, batch: Batch
) -> None:
    expected = [len(values) if values.ndim else 0 for values in batch.values()]
    assert cut(signature, body, batch) == [expected]


def test_specs_describe_the_inputs() -> None:
    found = specs(graph("(float[b, 3, t] x, int64[b] n) => (float[b, 3, t] y)", "y = Relu(x)"))
    assert list(map(str, found)) == ["x (float32 [b, 3, t])", "n (int64 [b])"]
