import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq import engine, engine_device
from onnx_intq.engine_file import (
    Request,
    Sidecar,
    build_file,
    load_session,
    read_sidecar,
    sidecar_path,
)
from onnx_intq.runtime import Session
from onnx_intq.transform import IntqError

FAKES = str(Path(__file__).parent / "fakes")
SHAPES = {"audio_signal": ((1, 4, 2), (1, 4, 8), (8, 4, 16)), "length": ((1,), (1,), (8,))}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FAKES)
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def request_(trt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """To build the speech model on the pretended T4; children are left out."""
    import engines

    def ask(module: str, request: Any, folder: Path, timeout: float) -> dict[str, Any]:
        assert module == "onnx_intq.engine"
        found = engine.answer(request, folder)
        return dict(json.loads(json.dumps(found)))

    monkeypatch.setattr(engine, "ask", ask)
    model = engines.speech_model()
    model.metadata_props.add(key="onnx_intq.recipe", value="fold_bn, insert_qdq")
    onnx.save(model, tmp_path / "m.onnx")
    return Request(model=tmp_path / "m.onnx", target=engine.choose(), shapes=SHAPES)


def tactics(file: Path) -> Any:
    return json.loads(file.read_bytes().removeprefix(b"fake plan "))["tactics"]


def test_the_sidecar_says_what_the_engine_is(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "e.engine"
    sidecar, reused = build_file(replace(request_, workspace=64), file)
    content, model = file.read_bytes(), request_.model.read_bytes()
    assert not reused
    assert sidecar.model == "m.onnx"
    assert sidecar.model_sha256 == hashlib.sha256(model).hexdigest()
    assert sidecar.recipe == "fold_bn, insert_qdq"
    assert (sidecar.library, sidecar.library_version) == ("tensorrt", "10.16.1")
    assert (sidecar.gpu, sidecar.compute_capability) == ("NVIDIA Fake T4", "7.5")
    assert sidecar.shapes == SHAPES
    assert sidecar.axes == {"audio_signal": ("batch", 4, "time"), "length": ("batch",)}
    assert (sidecar.workspace, sidecar.strongly_typed) == (64, True)
    assert sidecar.engine_sha256 == hashlib.sha256(content).hexdigest()
    assert sidecar.engine_bytes == len(content)
    assert sidecar.precisions("conv") == {"float": 1, "int8": 2}
    assert sidecar.precisions("matmul") == {}
    assert sidecar.alone == ("dq", "inner_q", "inner_dq")
    assert sidecar.metadata.keys() >= {"onnx_intq.frontend", "onnx_intq.labels"}
    assert read_sidecar(file) == sidecar == Sidecar.from_json(sidecar.to_json())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"m.onnx", "e.engine", "e.engine.json"}


def test_an_engine_that_fits_is_kept(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "e.engine"
    first, _ = build_file(request_, file)
    content = file.read_bytes()
    assert build_file(request_, file) == (first, True)
    assert file.read_bytes() == content
    forced, reused = build_file(request_, file, force=True)
    assert not reused
    assert forced.engine_sha256 != first.engine_sha256


def changed(request: Request, what: str, monkeypatch: pytest.MonkeyPatch) -> Request:
    target = request.target
    if what == "model":
        model = onnx.load(request.model)
        model.doc_string = "another"
        onnx.save(model, request.model)
    elif what == "version":
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.4")
    elif what == "gpu":
        return replace(request, target=replace(target, gpu="NVIDIA L4"))
    elif what == "capability":
        return replace(request, target=replace(target, compute_capability="8.9"))
    elif what == "shapes":
        return replace(request, shapes={**SHAPES, "length": ((1,), (2,), (8,))})
    elif what == "workspace":
        return replace(request, workspace=32)
    elif what == "timing cache":
        return replace(request, timing_cache=request.model.with_name("times"))
    return request


@pytest.mark.parametrize(
    "what",
    ["model", "version", "gpu", "capability", "shapes", "workspace", "timing cache"],
)
def test_an_engine_that_no_longer_fits_is_built_again(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    file = tmp_path / "e.engine"
    build_file(request_, file)
    again = changed(request_, what, monkeypatch)
    assert not build_file(again, file)[1]
    assert build_file(again, file)[1]


def test_a_note_changes_nothing(request_: Request, tmp_path: Path) -> None:
    build_file(request_, tmp_path / "e.engine")
    noted = replace(request_, target=replace(request_.target, note="hm"))
    assert build_file(noted, tmp_path / "e.engine")[1]


@pytest.mark.parametrize("damage", ["engine", "sidecar", "text"])
def test_a_damaged_pair_is_built_again(request_: Request, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "e.engine"
    build_file(request_, file)
    if damage == "engine":
        file.write_bytes(file.read_bytes() + b" ")
        assert read_sidecar(file) is None
    elif damage == "sidecar":
        sidecar_path(file).unlink()
        assert read_sidecar(file) is None
    else:
        sidecar_path(file).write_text('{"model": "m.onnx"}')
        with pytest.raises(IntqError, match=r"sidecar is none of this version .*; build"):
            read_sidecar(file)
    assert not build_file(request_, file)[1]
    assert read_sidecar(file) is not None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"products": [1]}'])
def test_other_texts_are_no_sidecar(text: str) -> None:
    with pytest.raises(IntqError, match="sidecar is none of this version"):
        Sidecar.from_json(text)


def test_unknown_precisions_are_counted(request_: Request, tmp_path: Path) -> None:
    sidecar, _ = build_file(request_, tmp_path / "e.engine")
    products = tuple(replace(product, precision="") for product in sidecar.products)
    assert replace(sidecar, products=products).precisions("conv") == {"unknown": 3}


def test_a_timing_cache_is_written_once_and_makes_builds_repeatable(
    request_: Request, tmp_path: Path
) -> None:
    times, first, second = (tmp_path / name for name in ("times", "1.engine", "2.engine"))
    timed = replace(request_, timing_cache=times)
    sidecar, _ = build_file(timed, first)
    content = times.read_bytes()
    assert sidecar.timing_cache_sha256 == hashlib.sha256(content).hexdigest()
    assert build_file(timed, first)[1]
    build_file(timed, second)
    assert first.read_bytes() == second.read_bytes()
    assert times.read_bytes() == content
    build_file(request_, second, force=True)
    assert tactics(second) != tactics(first)


def test_a_timing_cache_that_changed_is_refused(request_: Request, tmp_path: Path) -> None:
    times, file = tmp_path / "times", tmp_path / "e.engine"
    timed = replace(request_, timing_cache=times)
    sidecar, _ = build_file(timed, file)
    pinned = replace(timed, timing_cache_sha256=sidecar.timing_cache_sha256)
    file.unlink()  # the sidecar alone still pins
    times.write_bytes(times.read_bytes() + b" ")
    for each in (timed, pinned):
        with pytest.raises(
            IntqError, match=r"has sha256 .*; expected .*; restore it, or .*--force"
        ):
            build_file(each, file)
    times.unlink()
    for each in (timed, pinned):
        with pytest.raises(IntqError, match="times: no such file; expected the timing cache with"):
            build_file(each, file)
    assert not file.exists()
    with pytest.raises(IntqError, match="no such file"):
        build_file(pinned, file, force=True)
    assert not build_file(timed, file, force=True)[1]


def test_a_pinned_cache_must_have_all_times(request_: Request, tmp_path: Path) -> None:
    times, file = tmp_path / "times", tmp_path / "e.engine"
    times.write_bytes(b"{}")
    timed = replace(request_, timing_cache=times)
    build_file(timed, file)  # not pinned: what is missing is measured
    digest = hashlib.sha256(b"{}").hexdigest()
    for each in (timed, replace(timed, timing_cache_sha256=digest)):
        file.write_bytes(b"")
        with pytest.raises(IntqError, match="Timing cache miss for q; build without the pin"):
            build_file(each, file)
    model = onnx.load(request_.model)
    model.doc_string = "another model may need other kernels"
    onnx.save(model, request_.model)
    assert not build_file(timed, file)[1]


def test_timing_caches_without_effect_are_refused(request_: Request, tmp_path: Path) -> None:
    file, times = tmp_path / "e.engine", tmp_path / "times"
    rtx = engine.Target(backend="tensorrt-rtx", compute_capability="8.6")
    with pytest.raises(IntqError, match="has no effect: tensorrt-rtx times no kernels"):
        build_file(replace(request_, timing_cache=times, target=rtx), file)
    with pytest.raises(IntqError, match="sha256 without --timing-cache; expected both"):
        build_file(replace(request_, timing_cache_sha256="0"), file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e.plan", "expected one that ends in .engine; change -o"),
        ("none/e.engine", "its folder does not exist"),
        ("folder.engine", "is a folder"),
    ],
)
def test_outputs_are_checked_before_anything_is_built(
    request_: Request, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder.engine").mkdir()
    with pytest.raises(IntqError, match=message):
        build_file(request_, tmp_path / name)


def test_no_input_is_overwritten(request_: Request, tmp_path: Path) -> None:
    model = request_.model.rename(tmp_path / "m.engine")
    with pytest.raises(IntqError, match="output is the input file"):
        build_file(replace(request_, model=model), model)
    times = tmp_path / "t.engine"
    times.write_bytes(b"{}")
    with pytest.raises(IntqError, match="output is the input file"):
        build_file(replace(request_, model=model, timing_cache=times), times)
    missing = replace(request_, model=model, timing_cache=tmp_path / "none" / "times")
    with pytest.raises(IntqError, match="folder does not exist"):
        build_file(missing, tmp_path / "e.engine")


def test_a_build_that_fails_leaves_the_old_pair(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "e.engine"
    sidecar, _ = build_file(request_, file)
    monkeypatch.setattr(sys.modules["tensorrt"], "HAS_GPU", False)
    with pytest.raises(IntqError, match="cannot start"):
        build_file(request_, file, force=True)
    assert read_sidecar(file) == sidecar


def test_an_engine_file_is_loaded_with_its_metadata(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "e.engine"
    sidecar, _ = build_file(request_, file)
    session, found = load_session(file)
    assert found == sidecar
    assert session.metadata == sidecar.metadata
    audio = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    feeds = {"audio_signal": audio, "length": np.array([6, 3])}
    expected = Session(request_.model).run(feeds)["log_probs"]
    assert np.array_equal(session.run(feeds)["log_probs"], expected)
    sidecar_path(file).unlink()
    session, found = load_session(file)
    assert (found, session.metadata) == (None, {})


def test_a_missing_engine_is_told(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"e\.engine: no such file; expected an engine"):
        load_session(tmp_path / "e.engine")


def test_without_a_gpu_no_engine_runs(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_file(request_, tmp_path / "e.engine")
    monkeypatch.setattr(engine_device, "gpu", lambda: None)
    with pytest.raises(IntqError, match=r"e\.engine: running an engine needs an NVIDIA GPU"):
        load_session(tmp_path / "e.engine")
