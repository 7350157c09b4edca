import json
from typing import Any

import pytest

from onnx_intq.cost import Cost, NodeCost
from onnx_intq.cost_console import OWN, Run, show_cost
from onnx_intq.devices import device
from onnx_intq.roofline import roofline

Captured = pytest.CaptureFixture[str]
DENSE = NodeCost(name="dense", op="Conv", macs=10**9, bits=(8, 8), elements=(10**6, 10**6, 10**6))
THIN = NodeCost(name="thin", op="MatMul", macs=10**6, bits=(32, 32), elements=(10**6,) * 3)
FOUND = Cost(
    parameters=2_500_000,
    weight_bytes=10_000_000,
    inputs={},
    nodes=(DENSE, THIN, DENSE),
    uncounted=("Custom", "Loop"),
)
RUN = Run(10.0, 1)


def read(capsys: Captured) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def rows(capsys: Captured) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_costs_name_what_is_not_counted(capsys: Captured) -> None:
    show_cost(FOUND, None, RUN, None, as_json=False)
    out = capsys.readouterr().out
    assert "parameters  2.50 M in 10.00 MB\nMACs        2.001 G for 10 s of audio\n" in out
    assert "BOPs        0.129 T\n" in out
    assert out.endswith("not counted: Custom, Loop\n")
    show_cost(FOUND, None, RUN, None, as_json=True)
    found = read(capsys)
    assert found["by_op"]["Conv"] == {"nodes": 2, "macs": 2 * 10**9, "bops": 128 * 10**9}
    assert found.keys().isdisjoint({"roofline", "layers"})
    assert (found["seconds"], found["batch"]) == (10, 1)


def test_a_batch_is_told(capsys: Captured) -> None:
    show_cost(FOUND, None, Run(2.5, 8), None, as_json=False)
    assert "for 8 x 2.5 s of audio\n" in capsys.readouterr().out


def test_bounds_are_told_with_their_source(capsys: Captured) -> None:
    bounds = roofline(FOUND, device("t4"))
    show_cost(FOUND, bounds, RUN, None, as_json=False)
    out = capsys.readouterr().out
    assert "NVIDIA T4: at least so long for 10 s of audio; bound by memory:" in out
    assert "peak: float32 8.1, float16 65, int8 130 TOPS; memory 320 GB/s\n" in out
    assert out.endswith(f"source: {bounds.device.source}\n")
    table = [line.split() for line in out.splitlines()]
    # 2.001 GMACs at 8.1 TFLOPS, but that the thin product moves 12 MB at 320 GB/s.
    assert ["float32", "0.5313", "1", "33.33", "7.058"] in table
    assert ["int8", "0.04014", "13.24", "33.33", "23.35"] in table
    assert [*OWN.split(), "0.06827", "7.783", "33.33", "54.93"] in table


def test_bounds_as_json(capsys: Captured) -> None:
    bounds = roofline(FOUND, device("cpu-vnni", cores=2))
    show_cost(FOUND, bounds, RUN, None, as_json=True)
    found = read(capsys)["roofline"]
    assert (found["device"], found["title"]) == ("cpu-vnni", "cpu-vnni, 2 cores at 4 GHz")
    assert found["tops"] == {"float32": 0.512, "int8": 2.048}
    assert found["bounds"].keys() == {"float32", "int8", "as_stored"}
    own = found["bounds"]["as_stored"]
    assert own["seconds"] == bounds.own.seconds
    assert own["times_float32"] == bounds.speedup(bounds.own)
    assert own["memory_bound_products"] == pytest.approx(1 / 3)
    assert own["memory_bound_time"] == bounds.own.memory_time


def test_the_slowest_products_are_listed_with_what_binds_them(capsys: Captured) -> None:
    bounds = roofline(FOUND, device("t4"))
    show_cost(FOUND, bounds, RUN, 2, as_json=False)
    found = rows(capsys)
    start = found.index(["the", "costliest", "2", "of", "3"])
    assert [row[0] for row in found[start + 3 :]] == ["thin", "dense"]
    assert found[start + 3][1:] == ["MatMul", "1", "37.5", "memory", "9.375", "memory", "float32"]
    assert found[start + 4][1:] == ["Conv", "1,000", "246.9", "compute", "15.38", "compute", "int8"]
    show_cost(FOUND, bounds, RUN, 2, as_json=True)
    thin, dense = read(capsys)["layers"]
    assert (thin["name"], thin["precision"]) == ("thin", "float32")
    assert thin["float32"] == {"seconds": pytest.approx(37.5e-6), "bound": "memory"}
    assert dense["int8"] == {"seconds": pytest.approx(2 / 130e3), "bound": "compute"}


def test_without_a_device_the_products_with_most_bit_operations_are_listed(
    capsys: Captured,
) -> None:
    show_cost(FOUND, None, RUN, 1, as_json=False)
    found = rows(capsys)
    assert found[-1] == ["dense", "Conv", "1,000", "8x8"]
    show_cost(FOUND, None, RUN, 5, as_json=True)
    assert [layer["name"] for layer in read(capsys)["layers"]] == ["dense", "dense", "thin"]
