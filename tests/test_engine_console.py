import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_intq.engine_bench import Row
from onnx_intq.engine_console import show_build, show_parity, show_timings
from onnx_intq.engine_file import Sidecar
from onnx_intq.engine_layers import Product
from onnx_intq.engine_parity import Output, Parity
from onnx_intq.runtime import Timing

CONVOLUTIONS = [
    Product(name=f"conv{n}", kind="conv", precision="int8" if n < 3 else "float") for n in range(15)
]
PRODUCTS = (*CONVOLUTIONS, Product(name="head", kind="matmul", precision="int8"))
SIDECAR = Sidecar(
    onnx_intq="0.1.0",
    model="m.onnx",
    model_sha256="ab",
    recipe="fold_bn",
    library="tensorrt",
    library_version="10.16.1",
    compute_capability="7.5",
    gpu="Tesla T4",
    shapes={"x": ((1, 64, 2), (1, 64, 4), (8, 64, 8))},
    axes={"x": ("batch", 64, "time")},
    workspace=None,
    timing_cache_sha256=None,
    seconds=12.345,
    engine_sha256="cd",
    engine_bytes=21_500_000,
    products=PRODUCTS,
    alone=("q1", "q2"),
    metadata={"onnx_intq.labels": "[]"},
)
FILE = Path("e.engine")


def test_a_build_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    show_build(SIDECAR, FILE, reused=False, note="", as_json=False)
    names = ", ".join(f"conv{n}" for n in range(3, 13))
    assert capsys.readouterr().out.splitlines() == [
        "built by   tensorrt 10.16.1 for compute capability 7.5, Tesla T4",
        "took       12.3 s, 21.50 MB",
        "shapes     x=1x64x2:1x64x4:8x64x8",
        f"int8       3 of 15 convolutions: 12 float ({names}, ...)",
        "int8       1 of 1 products",
        "not fused  2 Q/DQ nodes: q1, q2",
        "wrote      e.engine and e.engine.json",
    ]


def test_a_float16_engine_names_no_product(capsys: pytest.CaptureFixture[str]) -> None:
    halves = tuple(replace(product, precision="half") for product in CONVOLUTIONS)
    show_build(replace(SIDECAR, products=halves), FILE, reused=False, note="", as_json=False)
    assert "half       15 of 15 convolutions" in capsys.readouterr().out.splitlines()


def test_an_engine_that_was_kept_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    kept = replace(SIDECAR, alone=(), gpu=None, products=())
    show_build(kept, FILE, reused=True, note="no GPU here", as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "built by   tensorrt 10.16.1 for compute capability 7.5, any GPU of this kind",
        "took       12.3 s, 21.50 MB",
        "shapes     x=1x64x2:1x64x4:8x64x8",
        "note       no GPU here",
        "kept       e.engine: it fits what was asked for; --force builds it again",
    ]


def test_a_build_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    show_build(SIDECAR, FILE, reused=True, note="n", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["reused"], found["note"]) == ("e.engine", True, "n")
    assert found["precisions"]["conv"] == {"float": 12, "int8": 3}
    assert found["engine_bytes"] == 21_500_000
    assert len(found["products"]) == 16


def rows() -> list[Row]:
    first = Timing(median=0.004, low=0.003, high=0.005, ratio=1.0, rounds=20)
    second = Timing(median=0.002, low=0.001, high=0.003, ratio=0.5, rounds=20)
    return [
        Row(engine="a.engine", batch=1, int8=0, products=3, alone=0, timing=first),
        Row(engine="b.engine", batch=1, int8=None, products=None, alone=None, timing=second),
    ]


def test_latencies_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_timings(rows(), 10.0, "Tesla T4", as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    title, header, _, first, second = lines
    assert title.strip() == "Tesla T4, 10 s of audio, 20 rounds in turn"
    assert "Q/DQ alone" in header
    assert first.split() == ["a.engine", "1", "0", "of", "3", "0", "4", "3", "5", "1"]
    assert second.split() == ["b.engine", "1", "?", "?", "2", "1", "3", "2"]


def test_latencies_are_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    show_timings(rows(), 10.0, "Tesla T4", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["seconds"]) == ("Tesla T4", 10)
    assert [e["speedup"] for e in found["engines"]] == [1, 2]
    assert found["engines"][1]["int8"] is None
    assert found["engines"][0]["timing"]["median"] == 0.004


PARITY = Parity(
    batches=1,
    outputs=(
        Output(name="log_probs", sqnr=34.5, largest=0.25, agree=99.5),
        Output(name="encoded", sqnr=math.inf, largest=0, agree=None),
    ),
    padded=0.0,
)


def test_parity_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_parity(PARITY, model=Path("m.onnx"), engine=FILE, as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].strip() == "e.engine against m.onnx, 1 batch"
    assert lines[3].split() == ["log_probs", "34.5", "0.25", "99.5"]
    assert lines[4].split() == ["encoded", "inf", "0", "-"]
    assert lines[5] == "padding moves the engine's outputs by at most 0"
    unpadded = replace(PARITY, padded=None, batches=2)
    show_parity(unpadded, model=Path("m.onnx"), engine=FILE, as_json=False)
    found = capsys.readouterr().out
    assert "2 batches" in found
    assert "padding" not in found


def test_parity_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    show_parity(PARITY, model=Path("m.onnx"), engine=FILE, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["engine"], found["batches"]) == ("m.onnx", "e.engine", 1)
    assert [output["sqnr"] for output in found["outputs"]] == [34.5, None]
    assert found["padded"] == 0
