from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_intq import engine, engine_bench, engine_build
from onnx_intq.engine_bench import feeds, latency
from onnx_intq.engine_file import Request, build_file, load_session, sidecar_path
from onnx_intq.engine_session import EngineSession
from onnx_intq.feeds import Batch
from onnx_intq.transform import IntqError

SHAPES = {"audio_signal": ((1, 4, 2), (1, 4, 8), (8, 4, 40)), "length": ((1,), (1,), (8,))}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    from fake_gpu import pretend

    module: ModuleType = pretend(monkeypatch)
    return module


@pytest.fixture
def files(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two engines of the speech model."""
    import engines

    def ask(module: str, request: Any, folder: Path, timeout: float) -> dict[str, Any]:
        return engine_build.answer(trt, request, folder)

    monkeypatch.setattr(engine, "ask", ask)
    onnx.save(engines.speech_model(), tmp_path / "m.onnx")
    request = Request(model=tmp_path / "m.onnx", target=engine.choose(), shapes=SHAPES)
    found = [tmp_path / "a.engine", tmp_path / "b.engine"]
    for file in found:
        build_file(request, file)
    return found


@pytest.mark.parametrize(("seconds", "batch", "frames"), [(0.3, 1, 30), (0.02, 8, 2), (0.4, 3, 40)])
@pytest.mark.parametrize("sidecar", [True, False])
def test_feeds_have_the_seconds_and_the_batch_asked_for(
    files: list[Path], seconds: float, batch: int, frames: int, sidecar: bool
) -> None:
    session, known = load_session(files[0])
    found = feeds(session, known if sidecar else None, seconds=seconds, batch=batch)
    assert found["audio_signal"].shape == (batch, 4, frames)
    assert found["length"].tolist() == [frames] * batch
    assert session.run(found)["encoded"].tolist() == [frames] * batch


def test_the_recorded_front_end_sets_the_frames(files: list[Path]) -> None:
    session, known = load_session(files[0])
    recorded = session.metadata["onnx_intq.frontend"]
    session.metadata = {
        "onnx_intq.frontend": recorded.replace('"window_stride": 0.01', '"window_stride": 0.02')
    }
    assert feeds(session, known, seconds=0.4, batch=1)["length"].tolist() == [20]


def test_engines_are_timed_in_turn(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    times = {"a.engine": iter([9.0] * 10 + [2, 4, 3]), "b.engine": iter([9.0] * 10 + [1, 1, 3])}

    def timer(self: EngineSession, given: Batch, *, graph: bool) -> Callable[[], float]:
        assert graph
        name, batch = Path(self._name).name, len(given["length"])

        def timed() -> float:
            order.append((name, batch))
            return float(next(times[name]))

        return timed

    monkeypatch.setattr(EngineSession, "timer", timer)
    first, second = latency(files, seconds=0.1, batches=(2,), rounds=3, graph=True)
    assert order == [("a.engine", 2), ("b.engine", 2)] * 13
    assert (first.engine, first.batch) == (str(files[0]), 2)
    assert (first.timing.median, first.timing.ratio, first.timing.rounds) == (3, 1, 3)
    assert (second.timing.median, second.timing.ratio) == (1, 0.5)
    assert np.allclose([first.timing.low, first.timing.high], [2.2, 3.8])


def test_every_batch_size_is_measured(files: list[Path]) -> None:
    found = latency(files, seconds=0.1, batches=(1, 8), rounds=2)
    assert [(row.engine, row.batch) for row in found] == [
        (str(file), batch) for batch in (1, 8) for file in files
    ]
    assert {(row.int8, row.products, row.alone) for row in found} == {(2, 3, 3)}
    assert all(0 < r.timing.low <= r.timing.median <= r.timing.high < 1 for r in found)


def test_without_a_sidecar_the_engine_tells_its_kernels(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar_path(files[0]).unlink()
    (found,) = latency(files[:1], seconds=0.1, rounds=1)
    assert (found.int8, found.products, found.alone) == (2, 3, None)
    monkeypatch.setattr(EngineSession, "describe", lambda _: "")
    (found,) = latency(files[:1], seconds=0.1, rounds=1)
    assert (found.int8, found.products, found.alone) == (None, None, None)


def test_what_cannot_be_measured_is_refused(files: list[Path]) -> None:
    with pytest.raises(IntqError, match="0 rounds of timing; expected at least 1"):
        latency(files, seconds=0.1, rounds=0)
    with pytest.raises(IntqError, match=r"has shape 1x4x1000; this engine takes 1x4x2 to 8x4x40"):
        latency(files, seconds=10)
    with pytest.raises(IntqError, match="0 seconds of audio"):
        latency(files, seconds=0)


def test_engines_without_known_products_have_none(files: list[Path]) -> None:
    session, known = load_session(files[0])
    assert known is not None
    timing = latency(files[:1], seconds=0.1, rounds=1)[0].timing
    row = engine_bench._row(files[0], 1, session, replace(known, products=()), timing)
    assert (row.int8, row.products, row.alone) == (None, None, 3)
