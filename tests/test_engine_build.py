import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from onnx_intq import engine_build
from onnx_intq.transform import IntqError

SHAPES = {"audio_signal": [[1, 4, 2], [1, 4, 8], [8, 4, 16]], "length": [[1], [1], [8]]}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def folder(trt: ModuleType, tmp_path: Path) -> Path:
    import engines

    onnx.save(engines.speech_model(), tmp_path / "speech.onnx")
    for name, node in {
        "own": "[odd] y = own.Odd(x)",
        "fails": "[det] y = Det(x)",
    }.items():
        onnx.save(engines.one_node(node), tmp_path / f"{name}.onnx")
    odd = engines.one_node("y = Relu(x)")
    odd.graph.name = "unexplained"
    onnx.save(odd, tmp_path / "unexplained.onnx")
    (tmp_path / "child").mkdir()
    return tmp_path


def answer(trt: Any, folder: Path, model: str = "speech", **changes: Any) -> dict[str, Any]:
    request = {
        "action": "build",
        "model": str(folder / f"{model}.onnx"),
        "backend": "tensorrt",
        "compute_capability": "7.5",
        "shapes": SHAPES if model == "speech" else {"x": [[4, 4]] * 3},
        "workspace": None,
        "timing_cache": False,
        "pinned": False,
    }
    found = engine_build.answer(trt, {**request, **changes}, folder / "child")
    assert json.loads(json.dumps(found)).keys() == found.keys()
    return found


def plan(folder: Path) -> Mapping[str, Any]:
    content = (folder / "child" / "engine").read_bytes()
    found: Mapping[str, Any] = json.loads(content.removeprefix(b"fake plan "))
    return found


def test_the_version_is_told(trt: ModuleType, folder: Path) -> None:
    assert answer(trt, folder, action="describe") == {"version": "10.16.1"}


def test_a_model_is_parsed_without_building(trt: ModuleType, folder: Path) -> None:
    found = answer(trt, folder, action="parse")
    assert found == {"version": "10.16.1", "layers": 10, "refusals": []}
    assert not list((folder / "child").iterdir())


@pytest.mark.parametrize("action", ["parse", "build"])
def test_what_the_parser_refuses_is_told(trt: ModuleType, folder: Path, action: str) -> None:
    (found,) = answer(trt, folder, "own", action=action)["refusals"]
    reason = "no importer for Odd at all"
    expected = {"index": 0, "name": "odd", "operator": "Odd", "reason": reason, "function": ""}
    assert found == expected
    (found,) = answer(trt, folder, "unexplained", action=action)["refusals"]
    assert (found["index"], found["reason"]) == (-1, "something is wrong")
    assert not list((folder / "child").iterdir())


@pytest.mark.parametrize("key", ["Format/Datatype", "Datatype"])
def test_an_engine_is_built_and_inspected(
    trt: ModuleType, folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "TYPE_KEY", key)
    found = answer(trt, folder)
    assert found["seconds"] > 0
    assert found["products"] == [("first", "conv"), ("second", "conv"), ("third", "conv")]
    assert found["quantizers"] == ["dq", "inner_q", "inner_dq"]
    assert len(json.loads(found["text"])["Layers"]) == 11
    assert plan(folder)["shapes"] == SHAPES
    assert plan(folder)["workspace"] == 0


def test_the_workspace_is_limited_in_mebibytes(trt: ModuleType, folder: Path) -> None:
    answer(trt, folder, workspace=64)
    assert plan(folder)["workspace"] == 64 * 2**20


def test_an_engine_that_cannot_be_loaded_is_not_inspected(
    trt: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = type("Runtime", (), {"deserialize_cuda_engine": lambda *_: None})
    monkeypatch.setattr(trt, "Runtime", lambda _: runtime())
    assert answer(trt, folder)["text"] == ""


def test_what_cannot_be_built_is_told(trt: ModuleType, folder: Path) -> None:
    assert answer(trt, folder, "fails")["failure"] == "no implementation for node det"
    assert not list((folder / "child").iterdir())


def test_a_timing_cache_makes_a_build_repeatable(trt: ModuleType, folder: Path) -> None:
    answer(trt, folder)
    first = plan(folder)["tactics"]
    assert not (folder / "child" / "timing_cache").exists()
    answer(trt, folder, timing_cache=True)
    second, cache = plan(folder)["tactics"], (folder / "child" / "timing_cache").read_bytes()
    assert first != second
    answer(trt, folder, timing_cache=True, pinned=True)
    assert plan(folder)["tactics"] == second
    assert (folder / "child" / "timing_cache").read_bytes() == cache


def test_a_pinned_cache_must_hold_all_times(trt: ModuleType, folder: Path) -> None:
    (folder / "child" / "timing_cache").write_bytes(b"{}")
    found = answer(trt, folder, timing_cache=True, pinned=True)
    assert found["failure"] == "Timing cache miss for q"


def test_a_cache_of_another_release_is_refused(trt: ModuleType, folder: Path) -> None:
    (folder / "child" / "timing_cache").write_bytes(b'{"release": 9}')
    with pytest.raises(IntqError, match=r"tensorrt 10\.16\.1 does not take the timing cache; "):
        answer(trt, folder, timing_cache=True)


def test_a_builder_that_does_not_start_is_told(
    trt: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "HAS_GPU", False)
    message = r"tensorrt 10\.16\.1 cannot start \(CUDA initialization failure with error: 35\)"
    with pytest.raises(IntqError, match=message):
        answer(trt, folder)
