import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.compare_tensors import Reading
from onnx_intq.comparison import REACH, Comparison, Errors, Row
from onnx_intq.transform import IntqError

REAL = Reading(name="t", tensor="t", dtype=np.dtype(np.float32))
GRID = Reading(name="t", tensor="q", dtype=np.dtype(np.int8), scale=0.5, zero_point=1)
COARSE = Reading(name="t", tensor="c", dtype=np.dtype(np.uint8), scale=2.0)


def errors(decibels: float) -> Errors:
    """Errors of that SQNR."""
    return Errors(elements=10, signal=1.0, noise=10 ** (-decibels / 10), largest=0.1)


def row(name: str, free: float, forced: float, *inputs: int, output: bool = False) -> Row:
    return Row(
        name=name,
        tensor=f"{name}_q",
        operators=("Conv",),
        nodes=(name,),
        inputs=inputs,
        scale=0.5,
        zero_point=0,
        same_grid=True,
        output=output,
        free=errors(free),
        forced=errors(forced),
    )


def comparison(*rows: Row) -> Comparison:
    return Comparison(kinds=("float", "QDQ"), batches=1, rows=rows)


def test_sqnr_is_signal_over_noise() -> None:
    found = Errors()
    a = np.array([3.0, 4.0], np.float32)
    found.add(REAL, a, REAL, a + np.array([0.3, -0.4], np.float32))
    assert found.sqnr == pytest.approx(20.0, abs=1e-4)
    assert found.largest == pytest.approx(0.4)
    assert (found.elements, found.half_steps, found.differing) == (2, 0, 0)
    assert found.decibels == "20.0 dB"


def test_without_noise_it_is_exact_and_without_signal_lost() -> None:
    found = Errors()
    found.add(REAL, np.zeros(3, np.float32), REAL, np.zeros(3, np.float32))
    assert (found.sqnr, found.decibels) == (math.inf, "exact")
    found.add(REAL, np.zeros(3, np.float32), REAL, np.ones(3, np.float32))
    assert found.sqnr == -math.inf


@given(st.integers(0, 99), st.sampled_from([REAL, GRID, COARSE]), st.sampled_from([REAL, GRID]))
def test_two_batches_count_as_one(seed: int, a: Reading, b: Reading) -> None:
    rng = np.random.default_rng(seed)
    values_a, values_b = (
        rng.standard_normal(20).astype(np.float32)
        if held is REAL
        else rng.integers(0, 9, 20, dtype=held.dtype)
        for held in (a, b)
    )
    whole, parts = Errors(), Errors()
    whole.add(a, values_a, b, values_b)
    for half in (slice(10, None), slice(10)):
        parts.add(a, values_a[half], b, values_b[half])
    assert vars(parts) == pytest.approx(vars(whole))


def test_integers_of_one_grid_are_counted() -> None:
    found = Errors()
    unsigned = Reading(
        name="t", tensor="u", dtype=np.dtype(np.uint8), scale=0.5, zero_point=129
    )  # the same reals, 128 higher
    a, b = np.array([128, 129, 131], np.uint8), np.array([0, 1, 1], np.int8)
    found.add(unsigned, a, GRID, b)
    assert (found.differing, found.most_steps, found.half_steps) == (1, 2, 1)
    assert (found.largest, found.noise, found.signal) == (1.0, 1.0, 0.25 + 1.0)


def test_elements_half_a_step_off_are_counted() -> None:
    found = Errors()
    found.add(REAL, np.array([0.0, 0.24, 0.25, -0.3], np.float32), GRID, np.ones(4, np.int8))
    assert (found.half_steps, found.differing) == (2, 0)


def test_what_a_masks_with_infinity_is_left_out() -> None:
    found = Errors()
    a = np.array([-np.inf, 1.0], np.float32)
    found.add(REAL, a, REAL, np.array([-9.0, 1.0], np.float32))
    assert (found.elements, found.noise) == (1, 0)
    found.add(REAL, np.ones(2, np.float32), REAL, -a)
    assert (found.largest, found.sqnr) == (math.inf, -math.inf)


@pytest.mark.parametrize(("model", "place"), [("A", 0), ("B", 1)])
def test_nan_is_refused(model: str, place: int) -> None:
    values = [np.ones(2, np.float32), np.ones(2, np.float32)]
    values[place][1] = np.nan
    with pytest.raises(IntqError, match=f"model {model} gives NaN in tensor 't'"):
        Errors().add(REAL, values[0], REAL, values[1])


def test_the_entry_is_the_layer_that_is_worst_by_itself_and_where_the_sum_falls_most() -> None:
    found = comparison(
        row("in", 40, 40),
        row("good", 38, 41, 0),
        row("bad", 15, 16, 1),
        row("after", 11, 30, 2, output=True),
        row("side", 37, 39, 0),
        row("sum", 12, 33, 3, 4),
    )
    assert found.forced_entry is not None
    assert found.free_entry is not None
    assert (found.forced_entry.name, found.free_entry.name) == ("bad", "bad")
    assert [r.name for r in found.worst][:2] == ["bad", "after"]
    assert [r.name for r in found.outputs] == ["after"]
    assert found.first_difference is found.rows[0]
    assert found.before(found.rows[5]) == pytest.approx(11)  # the worse of both inputs
    assert found.fall(found.rows[5]) == pytest.approx(-1)
    # 38 dB counts as 11 + REACH, so does all above: what happens there does not show in the end.
    assert found.fall(found.rows[2]) == pytest.approx(11 + REACH - 15)
    assert found.fall(found.rows[0]) == pytest.approx(0)
    assert found.describe_fall(found.rows[2]) == "38.0 -> 15.0 dB"
    assert found.describe_fall(found.rows[0]) == "exact -> 40.0 dB"


def test_without_errors_nothing_is_to_blame() -> None:
    found = comparison(row("a", math.inf, math.inf), row("b", math.inf, math.inf, 0))
    assert (found.forced_entry, found.free_entry, found.first_difference) == (None, None, None)
    assert found.fall(found.rows[1]) == 0


def test_json_holds_everything_and_no_infinity() -> None:
    lost = row("lost", 10, 20, 0, output=True)
    lost.free.largest = math.inf
    lost.free.signal = 0
    lost.forced.differing = 3
    found = comparison(row("in", math.inf, math.inf), lost)
    entries = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    first, second = entries["tensors"]
    assert (first["free"]["sqnr"], first["free"]["exact"]) == (None, True)
    assert (second["free"]["sqnr"], second["free"]["exact"]) == (None, False)
    assert (second["free"]["largest"], second["free"]["largest_in_steps"]) == (None, None)
    assert second["forced"]["sqnr"] == pytest.approx(20)
    assert second["forced"]["largest_in_steps"] == pytest.approx(0.2)
    assert entries["outputs"] == ["lost"]
    assert entries["worst"] == ["lost", "in"]
    assert entries["enters"]["teacher_forced"] == entries["first_difference"] == "lost"
    assert entries["differing_per_million"] == {"free": 0.0, "forced": 3e6 / 20}


def test_shares_are_null_where_no_grids_agree() -> None:
    plain = Row(
        name="a",
        tensor="a",
        operators=(),
        nodes=(),
        inputs=(),
        scale=None,
        zero_point=0,
        same_grid=False,
        output=False,
    )
    entries = comparison(plain).to_dict()
    assert entries["differing_per_million"] == {"free": None, "forced": None}
    (entry,) = json.loads(json.dumps(entries))["tensors"]
    assert entry["zero_point"] is entry["free"]["largest_in_steps"] is entry["free"]["differing"]
    assert entry["free"]["half_step_share"] is None
