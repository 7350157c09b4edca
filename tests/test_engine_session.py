import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from onnx_intq import engine_build, engine_file
from onnx_intq.engine_device import Device
from onnx_intq.engine_session import EngineSession
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

SHAPES = {"audio_signal": [[1, 4, 2], [1, 4, 8], [8, 4, 16]], "length": [[1], [1], [8]]}
Feeds = dict[str, npt.NDArray[Any]]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def model(trt: ModuleType) -> onnx.ModelProto:
    import engines

    found: onnx.ModelProto = engines.speech_model()
    return found


@pytest.fixture
def plan(trt: Any, model: onnx.ModelProto, tmp_path: Path) -> bytes:
    onnx.save(model, tmp_path / "m.onnx")
    request = {
        "action": "build",
        "model": str(tmp_path / "m.onnx"),
        "backend": "tensorrt",
        "shapes": SHAPES,
        "workspace": None,
        "timing_cache": False,
    }
    engine_build.answer(trt, request, tmp_path)
    return (tmp_path / "engine").read_bytes()


@pytest.fixture
def load(trt: Any, plan: bytes, model: onnx.ModelProto) -> Callable[[], EngineSession]:
    recorded = {p.key: p.value for p in model.metadata_props}
    return lambda: EngineSession(trt, plan, Device(), name="E.engine", metadata=recorded)


def feeds(batch: int = 2, frames: int = 5) -> Feeds:
    audio = np.random.default_rng(frames).standard_normal((batch, 4, frames)).astype(np.float32)
    return {"audio_signal": audio, "length": np.arange(1, batch + 1)}


def test_an_engine_takes_and_gives_what_its_model_does(
    load: Callable[[], EngineSession], model: onnx.ModelProto
) -> None:
    engine, reference = load(), Session(model)
    assert [(s.name, s.dtype) for s in engine.inputs] == [
        (s.name, s.dtype) for s in reference.inputs
    ]
    assert [s.shape for s in engine.inputs] == [(None, 4, None), (None,)]
    assert [s.shape for s in engine.outputs] == [(None, None, 3), (None,)]
    assert engine.metadata == reference.metadata
    for batch, frames in ((2, 5), (1, 16), (8, 2), (2, 5)):
        given = feeds(batch, frames)
        found, expected = engine.run(given), reference.run(given)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            assert np.array_equal(found[name], values)


def test_some_outputs_may_be_asked_for(load: Callable[[], EngineSession]) -> None:
    assert list(load().run(feeds(), ["encoded"])) == ["encoded"]
    with pytest.raises(IntqError, match=r"^E.engine: no output 'x'; expected one of: log_probs,"):
        load().run(feeds(), ["x"])


def test_arrays_in_any_layout_are_taken(load: Callable[[], EngineSession]) -> None:
    given = feeds()
    expected = load().run(given)["log_probs"]
    turned = np.asfortranarray(given["audio_signal"])
    assert np.array_equal(load().run(given | {"audio_signal": turned})["log_probs"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"audio_signal": np.zeros((1, 4, 17), np.float32)},
            "has shape 1x4x17; .* 1x4x2 to 8x4x16",
        ),
        ({"audio_signal": np.zeros((1, 3, 5), np.float32)}, r"shape \[1, 3, 5\]"),
        ({"audio_signal": np.zeros((1, 4, 5))}, "is float64"),
        ({"other": np.zeros(1)}, "'other'"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(
    load: Callable[[], EngineSession], change: Feeds, message: str
) -> None:
    with pytest.raises(IntqError, match=message):
        load().run(feeds(1) | change)


def test_inputs_may_lie_in_the_hosts_memory(
    load: Callable[[], EngineSession], trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "HOST", {"length", "encoded"})
    hosted: list[bool] = []
    upload = Device.upload

    def counted(self: Device, values: npt.NDArray[Any], *, host: bool = False) -> torch.Tensor:
        hosted.append(host)
        return upload(self, values, host=host)

    monkeypatch.setattr(Device, "upload", counted)
    assert load().run(feeds())["encoded"].tolist() == [1, 2]
    assert hosted == [False, True, False, True]


def test_an_engine_tells_the_shapes_it_takes(load: Callable[[], EngineSession]) -> None:
    engine = load()
    assert engine.profile("audio_signal") == ((1, 4, 2), (1, 4, 8), (8, 4, 16))
    assert engine.profile("length") == ((1,), (1,), (8,))


def test_runs_are_timed(load: Callable[[], EngineSession]) -> None:
    engine = load()
    for graph in (False, True):
        timer = engine.timer(feeds(), graph=graph)
        assert all(timer() > 0.0005 for _ in range(3))


def test_layers_are_described(load: Callable[[], EngineSession]) -> None:
    assert "Layers" in json.loads(load().describe())


def test_what_is_no_engine_is_refused(trt: Any) -> None:
    message = r"^e: cannot be loaded \(Serialization assertion failed: version tag\); expected an"
    with pytest.raises(IntqError, match=message):
        EngineSession(trt, b"", Device(), name="e")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("OUT_OF_MEMORY", True, "cannot be run .* expected enough free memory"),
        ("UNSHAPED", {"log_probs"}, "decides the shape of 'log_probs' as it runs"),
        ("STREAM", 8, r"does not run \(an address is missing\)"),
        ("TYPES", {"tensor(float)": "BF16", "tensor(int64)": "INT64"}, "has type BF16; "),
    ],
)
def test_what_an_engine_cannot_do_is_told_in_one_line(
    load: Callable[[], EngineSession],
    trt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: object,
    message: str,
) -> None:
    monkeypatch.setattr(trt, setting, value)
    with pytest.raises(IntqError, match=message) as caught:
        load().run(feeds())
    assert str(caught.value).startswith("E.engine: ")
    assert "\n" not in str(caught.value)


def test_shapes_that_need_more_are_refused(
    load: Callable[[], EngineSession], trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt.IExecutionContext, "infer_shapes", lambda _: ["length"])
    with pytest.raises(IntqError, match="cannot tell the shapes without 'length'"):
        load().run(feeds())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("tensorrt")),
    reason="needs a CUDA device and tensorrt",
)
def test_a_real_engine_gives_what_onnxruntime_gives(tiny: Path, tmp_path: Path) -> None:
    from onnx_intq import engine

    request = engine_file.Request(model=tiny, target=engine.choose("tensorrt"), shapes={})
    engine_file.build_file(request, tmp_path / "e.engine")
    session, _ = engine_file.load_session(tmp_path / "e.engine")
    audio = np.random.default_rng(0).standard_normal((1, 4, 300)).astype(np.float32)
    (expected,) = Session(tiny).run({"audio_signal": audio}).values()
    (found,) = session.run({"audio_signal": audio}).values()
    assert np.abs(found - expected).max() < 1e-2  # float32 products may be computed in TF32
    assert session.timer({"audio_signal": audio}, graph=True)() > 0
