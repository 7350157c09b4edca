import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import onnx
import pytest

Command = Callable[..., tuple[int, str, str]]
FAKES = Path(__file__).parent / "fakes"
needs_library = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: pip install 'onnx_intq[rtx]'"
)
needs_no_gpu = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for tensorrt, on a GPU that there is not."""
    monkeypatch.syspath_prepend(str(FAKES))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(str(FAKES))
    import engines

    monkeypatch.chdir(tmp_path)
    onnx.save(engines.speech_model(), "m.onnx")
    return Path("m.onnx")


@pytest.mark.slow
def test_an_engine_is_built_kept_and_measured(
    trt: ModuleType, model: Path, command: Command
) -> None:
    shapes = ("--shapes", "audio_signal=1x4x2:1x4x8:8x4x40")
    code, out, err = command("build", model, "-o", "e.engine", *shapes)
    assert (code, err) == (0, "")
    assert "shapes     audio_signal=1x4x2:1x4x8:8x4x40\nshapes     length=1:1:8\n" in out
    assert "int8       2 of 3 convolutions: 1 float (third)" in out
    assert out.endswith("wrote      e.engine and e.engine.json\n")
    code, out, _ = command("build", model, "-o", "e.engine", *shapes, "--json")
    found = json.loads(out)
    assert (code, found["reused"], found["library"]) == (0, True, "tensorrt")
    code, out, _ = command("build", model, "-o", "e.engine", *shapes, "--force", "--json")
    assert json.loads(out)["reused"] is False
    timing = ("--seconds", "0.2", "--rounds", "2", "--batch-size", "1", "--batch-size", "8")
    code, out, _ = command("bench", "e.engine", "e.engine", *timing, "--cuda-graph", "--json")
    rows = json.loads(out)["engines"]
    assert [(row["batch"], row["int8"], row["products"]) for row in rows] == [
        (batch, 2, 3) for batch in (1, 1, 8, 8)
    ]
    code, out, _ = command("bench", "e.engine", "--seconds", "0.2", "--rounds", "2")
    assert code == 0
    assert out.strip().startswith("NVIDIA Fake T4, 0.2 s of audio, 2 rounds in turn")


@pytest.mark.slow
def test_a_timing_cache_pins_a_build(trt: ModuleType, model: Path, command: Command) -> None:
    timed = ("--timing-cache", "times")
    code, out, _ = command("build", model, "-o", "a.engine", *timed, "--workspace", 64, "--json")
    found = json.loads(out)
    assert (code, found["workspace"]) == (0, 64)
    pinned = (*timed, "--timing-cache-sha256", found["timing_cache_sha256"])
    assert command("build", model, "-o", "b.engine", "--workspace", 64, *pinned)[0] == 0
    assert Path("a.engine").read_bytes() == Path("b.engine").read_bytes()
    Path("times").write_bytes(b"{}")
    code, out, err = command("build", model, "-o", "b.engine", *pinned)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: times: timing cache has sha256 ")


@pytest.mark.slow
@needs_library
@needs_no_gpu
def test_without_a_gpu_tensorrt_rtx_builds_and_says_so(model: Path, command: Command) -> None:
    code, out, err = command("build", model, "-o", "e.engine")
    assert (code, err) == (0, "")
    assert "for compute capability 8.6, any GPU of this kind\n" in out
    assert "note       no GPU and no tensorrt here: built with tensorrt-rtx, another product" in out
    sidecar = json.loads(Path("e.engine.json").read_text())
    assert sidecar["library"] == "tensorrt-rtx"
    before = Path("e.engine").stat().st_mtime_ns
    code, out, _ = command("build", model, "-o", "e.engine", "--json")
    assert json.loads(out)["reused"] is True
    assert Path("e.engine").stat().st_mtime_ns == before
    code, out, _ = command("build", model, "-o", "e.engine", "--compute-capability", "7.5")
    assert "wrote" in out
    assert {p.name for p in Path().iterdir()} >= {"m.onnx", "e.engine", "e.engine.json"}


@needs_no_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("build", "m.onnx", "-o", "e.engine", "--backend", "tensorrt"),
            "cannot import tensorrt (No module named 'tensorrt'); tensorrt needs it; run: pip ",
        ),
        (("bench", "e.engine"), "e.engine: running an engine needs an NVIDIA GPU; expected one, "),
        (("bench", "e.engine", "m.onnx"), "e.engine runs on the GPU, m.onnx on the CPU; expected "),
        (("bench", "m.onnx", "--batch-size", "2"), "--batch-size has no effect on ONNX files"),
        (("bench", "m.onnx", "--cuda-graph"), "--cuda-graph has no effect on ONNX files"),
        (("bench", "e.engine", "--threads", "2"), "--threads has no effect on engines"),
        (("build", "m.onnx", "-o", "e.plan"), "e.plan: engines are known by their names; "),
        (("build", "none.onnx", "-o", "e.engine"), "none.onnx: no such file; "),
        (("build", "m.onnx", "-o", "e.engine", "--shapes", "x"), "--shapes 'x'; expected INPUT="),
        (
            ("build", "m.onnx", "-o", "e.engine", "--shapes", "x=1x2"),
            "shapes given for 'x'; expected for one of: audio_signal, length",
        ),
        (
            ("build", "m.onnx", "-o", "e.engine", "--timing-cache", "times"),
            "--timing-cache times has no effect: tensorrt-rtx times no kernels; ",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    model: Path, command: Command, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["m.onnx"]


def test_an_integer_only_model_is_refused(tmp_path: Path, command: Command) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (int8[n, 1, t] x, int8[1, 1, 1] w) => (int32[n, 1, t] y) { y = ConvInteger(x, w) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "i.onnx")
    code, _, err = command("build", tmp_path / "i.onnx", "-o", tmp_path / "e.engine")
    assert (code, err.count("\n")) == (2, 1)
    assert "is integer-only, and TensorRT has no integer products" in err
    assert not (tmp_path / "e.engine").exists()
