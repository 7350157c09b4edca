"""Models that take and give integers, run on real values as onnxruntime's own nodes would."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.lowering import GRIDS, GRIDS_KEY
from onnx_intq.real_io import RealSession
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

law = settings(max_examples=60, deadline=None)


def model(text: str, grids: Any = None, **constants: Any) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    for name, values in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    if grids is not None:
        onnx.helper.set_model_props(proto, {GRIDS_KEY: json.dumps(grids)})
    return proto


@law
@given(
    st.sampled_from(sorted(GRIDS)),
    st.floats(2.0**-12, 4, width=32),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_values_are_converted_as_by_the_boundary_nodes(
    dtype: str, scale: float, point: int, seed: int
) -> None:
    """Bit for bit, at ties and beyond the ends, too."""
    info = np.iinfo(dtype)
    zero_point = info.min + point
    proto = model(
        f"""(float[n] x) => (float[n] y, {dtype}[n] q)
        {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}""",
        s=np.float32(scale),
        z=np.asarray(zero_point, dtype),
    )
    bare = model(
        f"({dtype}[n] x) => ({dtype}[n] y) {{ y = Identity(x) }}",
        {name: ["t", scale, zero_point] for name in "xy"},
    )
    random = np.random.default_rng(seed)
    halves = (random.integers(-600, 600, 200) + 0.5) * np.float32(scale)
    wide = random.uniform(info.min - 99.0, info.max + 99.0, 500) * scale
    x = np.concatenate([halves, wide, np.nextafter(np.float32(halves), 9)]).astype(np.float32)
    x = np.concatenate([x, np.array([0, -0.0, np.inf, -np.inf, 1e30], np.float32)])
    expected = Session(proto, threads=1).run({"x": x})
    real = RealSession(bare, threads=1)
    assert [(spec.name, spec.dtype.name) for spec in real.inputs] == [("x", "float32")]
    np.testing.assert_array_equal(real.run({"x": x})["y"], expected["y"])
    given_integers = real.run({"x": expected["q"]}, ["y"])
    np.testing.assert_array_equal(given_integers["y"], expected["y"])


def test_only_recorded_tensors_are_converted() -> None:
    proto = model(
        """(int8[n] x, int64[1] n, int8[n] z, float[n] f)
            => (int8[n] y, int64[1] m, int8[n] u, float[n] g)
        { y = Identity(x) m = Identity(n) u = Identity(z) g = Identity(f) }""",
        {
            "x": ["x", 0.5, 1],
            "y": ["y", 0.5, 1],
            "inner": ["i", 1.0, 0],
            "f": ["f", 2.0, 0],
            "g": ["g", 2.0, 0],
        },
    )
    real = RealSession(proto, threads=1)
    assert [spec.dtype.name for spec in real.inputs] == ["float32", "int64", "int8", "float32"]
    assert real.metadata.keys() == {GRIDS_KEY}
    feeds = {"x": np.array([1.0], np.float32), "n": np.array([7]), "z": np.array([3], np.int8)}
    found = real.run(feeds | {"f": np.array([2.5], np.float32)})
    assert [found[name].item() for name in ("y", "m", "u", "g")] == [1.0, 7, 3, 2.5]
    assert real.run(feeds | {"f": np.ones(1, np.float32)}, ["m"]).keys() == {"m"}


def test_other_models_run_as_they_are() -> None:
    proto = model("(float[n] x) => (float[n] y) { y = Neg(x) }")
    real = RealSession(proto, threads=1)
    assert real.inputs == Session(proto, threads=1).inputs
    assert real.run({"x": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]


def test_wrong_feeds_and_broken_metadata_are_told() -> None:
    text = "(int8[2] x) => (int8[2] y) { y = Identity(x) }"
    real = RealSession(model(text, {"x": ["x", 0.5, 1]}), threads=1)
    with pytest.raises(IntqError, match="x"):
        real.run({"x": np.ones(3, np.float32)})
    with pytest.raises(IntqError, match="z"):
        real.run({"z": np.ones(2, np.float32)})
    with pytest.raises(IntqError, match="is int64; expected"):
        real.run({"x": np.ones(2, np.int64)})
    with pytest.raises(IntqError, match=r"onnx_intq.grids cannot be read"):
        RealSession(model(text, {"x": 3}))
