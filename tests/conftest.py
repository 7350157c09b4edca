"""Fixtures shared by all tests."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq.cli import main
from onnx_intq.frontend import Frontend
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and speech; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("INTQ_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set INTQ_ASSETS")
    return folder


TINY = """<ir_version: 8, opset_import: ["" : 17]>
    tiny (float[batch, 4, time] audio_signal) => (float[batch, time, 3] log_probs) {
        c = Conv<pads = [1, 1]>(audio_signal, w1)
        n = BatchNormalization(c, gamma, beta, mean, variance)
        r = Relu(n)
        l = Conv(r, w2, b2)
        t = Transpose<perm = [0, 2, 1]>(l)
        log_probs = LogSoftmax(t)
    }"""
"""A recognizer of the letter a and the space: Conv, BatchNormalization, Relu, Conv."""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file `m.onnx`: a recognizer with random weights, one BatchNormalization, 4 mel bands."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((8, 4, 3)),
        "gamma": random.uniform(0.5, 2, 8),
        "beta": random.standard_normal(8),
        "mean": random.standard_normal(8),
        "variance": random.uniform(5, 20, 8),
        "w2": random.standard_normal((3, 8, 1)),
        "b2": random.standard_normal(3),
    }
    model = onnx.parser.parse_model(TINY)
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    frontend = Frontend(sample_rate=8000, features=4)
    recorded = {FRONTEND_KEY: frontend.to_json(), LABELS_KEY: labels_to_json("a ")}
    onnx.helper.set_model_props(model, recorded)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A manifest of two utterances of noise, half a second each, that are said to be words."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path / "speech"
    folder.mkdir()
    lines: list[str] = []
    for number in range(2):
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, 4000 + 400 * number)
        soundfile.write(folder / f"{number}.wav", noise, 8000)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": "a a"}))
    manifest = folder / "manifest.json"
    manifest.write_text("\n".join(lines))
    return manifest


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `onnx-intq` with the arguments given; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnx-intq", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call
