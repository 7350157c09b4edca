from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.calibrate import Observation, calibrate, observe, observed
from onnx_intq.clipping import DEAD_RANGE, OBSERVERS
from onnx_intq.feeds import Batch
from onnx_intq.graph import graph_from_model, load
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
NETWORK = f"""{HEADER} network (float[b, 2, t] x) => (float[b, 3, t] y)
    <float[3, 2, 1] w = {{1.5, -2, 0.3, 1, -1, 0.7}}, float[3] one = {{1, 1, 1}},
     float[3] v = {{1, 2, 3}}, float zero = {{0}}> {{
        a = Conv(x, w)
        b = BatchNormalization(a, one, v, v, one)
        c = Relu(b)
        size = Shape(c)
        d = Add(c, c)
        e = Clip(d)
        dead = Mul(e, zero)
        y = Add(e, dead)
    }}"""


def graph(text: str = NETWORK) -> gs.Graph:
    return graph_from_model(onnx.parser.parse_model(text))


def batch(samples: int, frames: int = 6, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((samples, 2, frames)).astype(np.float32)}


def text_of(batches: list[Batch]) -> str:
    return calibrate(graph(), batches, threads=1).to_json()


def test_activations_are_observed_unless_fusion_removes_them() -> None:
    # b ends in the Relu, d in the Clip; size is no float. A BatchNormalization that is left when
    # ranges are sought stays for good, and what it reads exists.
    assert observed(graph()) == ["x", "a", "c", "e", "dead", "y"]


def test_outputs_shared_tensors_and_inputs_are_observed_before_an_activation_too() -> None:
    text = f"""{HEADER} g (float[4] x) => (float[4] a, float[4] y) {{
        a = Relu(x)
        b = Relu(a)
        c = Abs(b)
        d = Relu(c)
        e = Clip(c)
        y = Add(d, e)
    }}"""
    assert observed(graph(text)) == ["x", "a", "b", "c", "d", "e", "y"]


def test_a_bound_of_clip_is_no_value_it_fuses_with() -> None:
    text = f"""{HEADER} g (float[4] x, float z) => (float[4] y) {{
        low = Neg(z)
        a = Abs(x)
        y = Clip(a, low)
    }}"""
    assert observed(graph(text)) == ["x", "z", "low", "y"]


def test_bodies_are_not_observed() -> None:
    text = f"""{HEADER} g (float[4] x, bool q) => (float[4] y) {{
        y = If(q) <
            then_branch = yes () => (float[4] t) {{ u = Neg(x) t = Neg(u) }},
            else_branch = no () => (float[4] e) {{ e = Abs(x) }}
        >
    }}"""
    assert observed(graph(text)) == ["x", "y"]


def test_minmax_is_exact_and_holds_zero() -> None:
    batches = [batch(3), batch(2, frames=9, seed=1)]
    found = calibrate(graph(), batches, threads=1).select()
    every = np.concatenate([b["x"].reshape(-1) for b in batches])
    assert found["x"] == (every.min(), every.max())
    assert found["c"][0] == 0
    assert found["e"][1] == 2 * found["c"][1]


def test_all_methods_come_from_one_sweep() -> None:
    ranges = calibrate(graph(), iter([batch(3)]), observer="mse", threads=1)
    assert ranges.observer == "mse"
    expected = {*OBSERVERS, "mse_symmetric", "entropy_symmetric"}
    assert all(set(methods) == expected for methods in ranges.tensors.values())


def test_dead_tensors_get_a_safe_range() -> None:
    ranges = calibrate(graph(), [batch(2)], threads=1)
    assert set(ranges.tensors["dead"].values()) == {DEAD_RANGE}


@settings(derandomize=True, deadline=None, max_examples=8)
@given(st.sets(st.integers(1, 6)), st.booleans())
def test_cuts_and_order_do_not_matter_bit_for_bit(cuts: set[int], reverse: bool) -> None:
    whole = batch(7)
    pieces: list[Batch] = [{"x": piece} for piece in np.split(whole["x"], sorted(cuts))]
    assert text_of(pieces[:: -1 if reverse else 1]) == text_of([whole])


def test_shares_of_the_data_merge_to_the_observation_of_all_of_it() -> None:
    batches = [batch(2, seed=seed) for seed in range(3)]
    shares = [observe(graph(), [b], threads=1) for b in batches]
    expected = calibrate(graph(), batches, threads=1)
    a, b, c = shares
    assert a.merge(b).merge(c).ranges("minmax") == expected
    assert c.merge(b.merge(a)).ranges("minmax") == expected
    assert a.merge(Observation()).ranges("minmax") == a.ranges("minmax")


def test_time_as_the_first_axis_is_not_cut() -> None:
    text = f"""{HEADER} g (float[t, f] x) => (float[t, f] y) <int64 axis = {{0}}> {{
        y = CumSum(x, axis)
    }}"""
    found = calibrate(graph(text), [{"x": np.ones((5, 2), np.float32)}], threads=1)
    assert found.select()["y"] == (0.0, 5.0)


def test_tensors_without_values_have_no_range() -> None:
    text = f"""{HEADER} g (float[b, 2] x) => (float[b, 2] y, float[b, 0] z)
        <int64[1] start = {{2}}, int64[1] end = {{9}}, int64[1] axis = {{1}}> {{
        y = Neg(x)
        z = Slice(x, start, end, axis)
    }}"""
    found = calibrate(graph(text), [{"x": np.ones((3, 2), np.float32)}], threads=1)
    assert set(found.tensors) == {"x", "y"}


def test_progress_is_told_after_each_batch() -> None:
    batches, told = [batch(2), batch(1)], list[tuple[int, int]]()
    calibrate(graph(), batches, threads=1, progress=lambda *state: told.append(state))
    assert told == [(1, 2), (2, 2)]
    calibrate(graph(), iter(batch(1) for _ in "ab"), progress=lambda *state: told.append(state))
    assert told[2:] == [(1, 1), (2, 2)]


def test_nan_is_refused_with_the_tensors_name() -> None:
    text = f"{HEADER} g (float[b, 2] x) => (float[b, 2] y) {{ y = Log(x) }}"
    with pytest.raises(IntqError, match="tensor 'y' holds NaN; expected finite values"):
        calibrate(graph(text), [{"x": -np.ones((1, 2), np.float32)}], threads=1)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(IntqError, match="the data holds no batch"):
        calibrate(graph(), [], threads=1)
    with pytest.raises(IntqError, match="feeds lack input 'x'"):
        calibrate(graph(), [{}], threads=1)
    with pytest.raises(IntqError, match="unknown observer 'max'"):
        calibrate(graph(), [batch(1)], observer="max", threads=1)
    half = f"{HEADER} g (float16[2] x) => (float16[2] y) {{ y = Neg(x) }}"
    with pytest.raises(IntqError, match="is float16; expected a float32 model"):
        calibrate(graph(half), [batch(1)], threads=1)


def test_a_real_model_gets_the_same_ranges_however_its_data_is_cut(assets: Path) -> None:
    model = load(assets / "matchboxnet_3x2x64_all35_bn.onnx")
    (spec,) = model.inputs
    shape = [4, *(100 if not isinstance(d, int) else d for d in spec.shape[1:])]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = calibrate(model, [{spec.name: values}], threads=1)
    cut = calibrate(model, [{spec.name: values[i : i + 1]} for i in (3, 1, 0, 2)], threads=1)
    assert whole == cut
    assert len(whole.tensors) > 20
