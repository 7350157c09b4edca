from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_intq.engine_parity import PADDING, parity
from onnx_intq.feeds import TensorSpec
from onnx_intq.models.export import export_named
from onnx_intq.real_io import RealSession
from onnx_intq.transform import IntqError

Arrays = Mapping[str, npt.NDArray[Any]]
AUDIO = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 2, None))
LENGTH = TensorSpec(name="length", dtype=np.dtype(np.int64), shape=(None,))


class Doubling:
    """Gives twice its input, turned, plus an error; and the lengths."""

    def __init__(self, error: float = 0.0, leak: float = 0.0, lengths: bool = True) -> None:
        self.inputs: tuple[TensorSpec, ...] = (AUDIO, LENGTH) if lengths else (AUDIO,)
        self._error, self._leak = error, leak
        self.frames: list[int] = []

    def run(self, feeds: Arrays) -> Arrays:
        x = feeds["x"]
        self.frames.append(x.shape[-1])
        y = 2 * x.transpose(0, 2, 1) + self._error + self._leak * (x[0, 0, -1] == 0)
        return {"y": y, "encoded": feeds["length"]} if "length" in feeds else {"y": y}


def batches(count: int, *, lengths: bool = True) -> list[dict[str, npt.NDArray[Any]]]:
    random = np.random.default_rng(0)
    found = [
        {"x": random.standard_normal((2, 2, 5 + n)).astype(np.float32), "length": np.array([5, 3])}
        for n in range(count)
    ]
    return [b if lengths else {"x": b["x"]} for b in found]


def test_an_engine_that_computes_the_same_is_exact() -> None:
    steps: list[tuple[int, int]] = []
    found = parity(
        Doubling(), Doubling(), iter(batches(3)), progress=lambda *step: steps.append(step)
    )
    assert (found.batches, found.padded) == (3, 0)
    assert [(o.name, o.sqnr, o.largest) for o in found.outputs] == [
        ("y", np.inf, 0),
        ("encoded", np.inf, 0),
    ]
    assert [o.agree for o in found.outputs] == [100, None]
    assert steps == [(1, 1), (2, 2), (3, 3)]


def test_errors_are_summed_over_all_batches() -> None:
    given = batches(2)
    found = parity(Doubling(), Doubling(error=0.5), given).outputs[0]
    signal = sum(float(np.square(2 * b["x"].astype(np.float64)).sum()) for b in given)
    noise = sum(0.25 * b["x"].size for b in given)
    assert found.sqnr == pytest.approx(10 * np.log10(signal / noise), abs=1e-4)
    assert found.largest == pytest.approx(0.5, abs=1e-6)
    assert found.agree == 100


def test_positions_with_another_largest_entry_are_counted() -> None:
    class Swapping(Doubling):
        def run(self, feeds: Arrays) -> Arrays:
            found = dict(super().run(feeds))
            found["y"] = found["y"].copy()
            found["y"][:, :2] = found["y"][:, :2, ::-1]
            return found

    (given,) = batches(1)
    assert parity(Doubling(), Swapping(), [given]).outputs[0].agree == 60


def test_silence_that_changes_what_was_there_is_found() -> None:
    engine = Doubling(leak=0.25)
    found = parity(Doubling(), engine, batches(1))
    assert found.padded == pytest.approx(0.25, abs=1e-6)
    assert engine.frames == [5, int(np.ceil(5 * PADDING))]


@pytest.mark.parametrize(
    ("longest", "frames"),
    [(99, [5, 7, 6, 8]), (7, [5, 7, 6, 7]), (6, [5, 6, 6])],
)
def test_padding_stops_where_the_engine_does(longest: int, frames: list[int]) -> None:
    engine = Doubling(leak=0.25)
    found = parity(Doubling(), engine, batches(2), largest={"x": (8, 2, longest)})
    assert engine.frames == frames
    assert found.padded == pytest.approx(0.25, abs=1e-6)


def test_an_engine_of_one_length_is_not_padded() -> None:
    engine = Doubling(leak=0.25)
    assert parity(Doubling(), engine, batches(1), largest={"x": (8, 2, 5)}).padded is None
    assert engine.frames == [5]


def test_without_lengths_nothing_is_padded() -> None:
    engine = Doubling(leak=0.25, lengths=False)
    assert parity(Doubling(), engine, batches(1, lengths=False)).padded is None
    assert engine.frames == [5]


def test_other_outputs_and_no_data_are_refused() -> None:
    class Shorter(Doubling):
        def run(self, feeds: Arrays) -> Arrays:
            return {"y": super().run(feeds)["y"][:, 1:]}

    message = r"gives y \[2, 5, 2\], encoded \[2\], the engine y \[2, 4, 2\]; expected the same"
    with pytest.raises(IntqError, match=message):
        parity(Doubling(), Shorter(), batches(1))
    with pytest.raises(IntqError, match="holds no batch"):
        parity(Doubling(), Doubling(), [])


@pytest.mark.slow
def test_masks_keep_padding_out_of_a_real_model(tmp_path: Path) -> None:
    export_named("digits", str(tmp_path / "m.onnx"), lengths=True)
    session = RealSession(tmp_path / "m.onnx", threads=1)
    audio = np.random.default_rng(0).standard_normal((2, 64, 100)).astype(np.float32)
    batch = {"audio_signal": audio, "length": np.array([100, 100])}
    found = parity(session, session, [batch])
    assert found.padded is not None
    assert found.padded < 1e-4
    assert all(output.largest == 0 for output in found.outputs)
