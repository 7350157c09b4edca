"""The table of sizes, memory and latency, made of a small model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench_compress() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        return import_module("bench_compress")


@pytest.mark.slow
def test_each_way_is_a_row(
    bench_compress: ModuleType, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read as Linux tells it")
    options = ["--rounds", "1", "--seconds", "0.5"]
    bench_compress.main([f"float={tiny}", *options, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in rows] == list(bench_compress.WAYS)
    for row in rows:
        assert row["file"] == tiny.stat().st_size
        assert 0 < row["loaded"] <= row["peak"]
        assert row["milliseconds"] > 0
    table = bench_compress.markdown([bench_compress.Row(**row) for row in rows])
    assert table.count("\n") == 4
    assert "+0.0 %" in table


def test_the_child_answers_in_json(
    bench_compress: ModuleType, rnnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    for way in bench_compress.WAYS:
        request = {"path": str(rnnt), "way": way, "seconds": 0.3, "rounds": 1}
        bench_compress.main(["--child", json.dumps(request)])
        assert json.loads(capsys.readouterr().out)["milliseconds"] > 0


def test_a_model_that_cannot_be_loaded_is_named(bench_compress: ModuleType, tiny: Path) -> None:
    tiny.write_bytes(b"none")
    with pytest.raises(SystemExit, match="not an ONNX model"):
        bench_compress.main([f"x={tiny}"])
