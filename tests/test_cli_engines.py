"""Engine files in place of ONNX files: recognized with, evaluated, compared; on a pretended GPU."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnx_intq import engine, engine_build
from onnx_intq.engine_file import Request, build_file, sidecar_path
from onnx_intq.feeds import write
from onnx_intq.real_io import RealSession
from onnx_intq.recognizer import Recognizer

Command = Callable[..., tuple[int, str, str]]
SHAPES = {"audio_signal": ((1, 4, 2), (1, 4, 8), (8, 4, 60)), "length": ((1,), (1,), (8,))}
MANIFEST = ("--manifest", "speech/manifest.json")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def request_(trt: Any, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """The folder with `s.onnx`, its engine `e.engine` and speech is the current one."""
    import engines

    def ask(module: str, request: Any, folder: Path, timeout: float) -> dict[str, Any]:
        return engine_build.answer(trt, request, folder)

    monkeypatch.setattr(engine, "ask", ask)
    monkeypatch.chdir(tmp_path)
    onnx.save(engines.speech_model(), "s.onnx")
    request = Request(model=Path("s.onnx"), target=engine.choose("tensorrt"), shapes=SHAPES)
    build_file(request, Path("e.engine"))
    return request


@pytest.fixture
def there(request_: Request) -> None:
    """As `request_`, for those who build nothing else."""


def found(outcome: tuple[int, str, str]) -> Any:
    code, out, err = outcome
    assert (code, err) == (0, "")
    return json.loads(out)


def complaint(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("error: ")


def test_padding_is_not_heard(there: None) -> None:
    random = np.random.default_rng(0)
    audio = [random.standard_normal((4, frames)).astype(np.float32) for frames in (60, 7, 31)]
    heard = Recognizer(Path("e.engine")).transcribe(audio)
    assert heard == Recognizer("s.onnx").transcribe(audio)
    assert heard == [Recognizer("e.engine").transcribe([each])[0] for each in audio]
    assert len(set(heard)) == 3


def test_a_session_is_that_of_the_model(there: None) -> None:
    engine, model = (RealSession(file, threads=1) for file in ("e.engine", "s.onnx"))
    assert engine.metadata == model.metadata
    assert [(s.name, s.dtype) for s in engine.inputs] == [(s.name, s.dtype) for s in model.inputs]
    given = {"audio_signal": np.ones((2, 4, 5), np.float32), "length": np.array([5, 2])}
    assert engine.run(given, ["encoded"])["encoded"].tolist() == [5, 2]


@pytest.mark.parametrize("batch", ["1", "2"])
def test_an_engine_has_the_word_errors_of_its_model(
    there: None, command: Command, batch: str
) -> None:
    """The utterances differ in length, so the shorter one of two is padded."""
    options = (*MANIFEST, "--batch-size", batch, "--json")
    expected = found(command("evaluate", "s.onnx", *options))
    assert found(command("evaluate", "e.engine", *options)) == expected
    assert expected["words"] == 4
    both = found(command("evaluate", "e.engine", "--against", "s.onnx", "--threads", 1, *options))
    assert (both["differs"], both["against_wer"]) == (0, expected["wer"])


def test_without_a_sidecar_front_end_and_labels_are_asked_for(
    there: None, command: Command
) -> None:
    sidecar_path(Path("e.engine")).unlink()
    message = "model does not record its frontend "
    assert complaint(command("evaluate", "e.engine", *MANIFEST)).startswith(message)


def test_an_engine_built_for_other_lengths_is_told(request_: Request, command: Command) -> None:
    short = {"audio_signal": ((1, 4, 2), (1, 4, 8), (1, 4, 9)), "length": ((1,), (1,), (1,))}
    build_file(replace(request_, shapes=short), Path("e.engine"))
    line = complaint(command("evaluate", "e.engine", *MANIFEST))
    assert "this engine takes 1x4x2 to 1x4x9; build it with other --shapes" in line


def test_an_engine_is_compared_with_its_model(there: None, command: Command) -> None:
    parity = found(command("compare", "s.onnx", "e.engine", "--json"))
    assert (parity["model"], parity["engine"], parity["batches"]) == ("s.onnx", "e.engine", 1)
    assert [(o["name"], o["largest"]) for o in parity["outputs"]] == [
        ("log_probs", 0),
        ("encoded", 0),
    ]
    assert parity["padded"] == 0
    code, out, _ = command("compare", "s.onnx", "e.engine", "--threads", 1)
    assert code == 0
    assert "e.engine against s.onnx, 1 batch\n" in out


@pytest.mark.parametrize(("limit", "batches"), [((), 2), (("--batches", 1), 1)])
def test_an_engine_is_compared_on_speech(
    there: None, command: Command, limit: tuple[object, ...], batches: int
) -> None:
    options = ("--data", "speech/manifest.json", *limit, "--json")
    parity = found(command("compare", "s.onnx", "e.engine", *options))
    assert (parity["batches"], parity["padded"]) == (batches, 0)


def test_an_engine_is_compared_on_batches_of_ones_own(there: None, command: Command) -> None:
    audio = np.random.default_rng(0).standard_normal((3, 4, 60)).astype(np.float32)
    write("feeds.npz", [{"audio_signal": audio, "length": np.array([60, 20, 3])}])
    parity = found(command("compare", "s.onnx", "e.engine", "--data", "feeds.npz", "--json"))
    assert (parity["batches"], parity["padded"]) == (1, None)  # it takes nothing longer


def test_the_error_of_an_engine_is_seen(request_: Request, command: Command) -> None:
    model = onnx.load("s.onnx")
    weights = next(t for t in model.graph.initializer if t.name == "w3")
    halved = (onnx.numpy_helper.to_array(weights) / 2).astype(np.float32)
    weights.CopyFrom(onnx.numpy_helper.from_array(halved, "w3"))
    onnx.save(model, "other.onnx")
    build_file(replace(request_, model=Path("other.onnx")), Path("other.engine"))
    parity = found(command("compare", "s.onnx", "other.engine", "--json"))
    # Outputs are linear in w3: the engine's are half the model's, and so is their error.
    assert parity["outputs"][0]["sqnr"] == pytest.approx(20 * np.log10(2), abs=1e-3)
    assert parity["outputs"][0]["agree"] == 100
    assert parity["outputs"][1]["sqnr"] is None


def test_another_model_than_the_engines_is_told(there: None, tiny: Path, command: Command) -> None:
    line = complaint(command("compare", "m.onnx", "e.engine"))
    assert "feeds hold 'length', which the model does not take" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "e.engine", "s.onnx"), "A is an engine, e.engine; expected the ONNX file "),
        (("compare", "e.engine", "e.engine"), "A is an engine, e.engine; expected the ONNX file "),
        (("compare", "s.onnx", "none.engine"), "none.engine: no such file; expected an engine"),
        (("compare", "none.onnx", "e.engine"), "none.onnx: no such file; expected an ONNX model"),
        (("compare", "s.onnx", "e.engine", "--plot", "p.png"), "--plot has no effect on engines, "),
        (("compare", "s.onnx", "e.engine", "--worst", 3), "--worst has no effect on engines, wh"),
        (("compare", "s.onnx", "e.engine", "--all"), "--all has no effect on engines, which"),
        (("compare", "s.onnx", "e.engine", "--frontend", "f"), "--frontend f without --data; "),
        (("evaluate", "none.engine", *MANIFEST), "none.engine: no such file; expected an engine"),
        (("evaluate", "e.engine", *MANIFEST, "--threads", 2), "--threads has no effect on engines"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    there: None, command: Command, arguments: tuple[object, ...], message: str
) -> None:
    assert complaint(command(*arguments)).startswith(message)


@pytest.mark.parametrize(
    "line", [("evaluate", "e.engine", *MANIFEST), ("compare", "s.onnx", "e.engine")]
)
def test_what_is_missing_is_told(
    there: None, command: Command, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "cannot import tensorrt " in complaint(command(*line))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "e.engine: running an engine needs an NVIDIA GPU; expected one, but torch "
    assert complaint(command(*line)).startswith(message)
