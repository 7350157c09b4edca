"""The table of the trained Conformer: which models are scored, on which strings."""

import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from onnx_intq import feeds
from onnx_intq.manifest import read_manifest
from onnx_intq.models.export import export_named


@pytest.fixture
def bench_conformer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with three strings in place of hundreds."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    module = import_module("bench_conformer")
    monkeypatch.setattr(module, "HELD_OUT", 3)
    monkeypatch.setattr(module, "CALIBRATION_STRINGS", 2)
    return module


@pytest.fixture
def fsdd(tmp_path: Path) -> Path:
    """A folder of assets with one speaker, whose held-out recordings are twice as long."""
    folder = tmp_path / "assets" / "fsdd"
    folder.mkdir(parents=True)
    tone = 0.1 * np.sin(np.arange(2000))
    for digit in range(10):
        for index, length in ((0, 2000), (5, 1000)):
            soundfile.write(folder / f"{digit}_ann_{index}.wav", tone[:length], 8000)
    return folder.parent


@pytest.fixture
def calls(bench_conformer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that were run: `quantize` copies the float model, `synthesize` makes nothing."""
    seen: list[Any] = []

    def run(command: str, *rest: object) -> None:
        seen.append((command, *map(str, rest)))
        source, path = rest[0], Path(str(rest[2]))
        if command == "export":
            export_named(str(source), path)
        elif command == "quantize":
            shutil.copyfile(str(source), path)
        else:
            path.touch()

    monkeypatch.setattr(bench_conformer, "_cli", run)
    return seen


@pytest.mark.slow
def test_rows_are_scored_on_the_same_strings_and_made_once(
    bench_conformer: ModuleType, fsdd: Path, tmp_path: Path, calls: list[Any], capsys: Any
) -> None:
    peers: list[bool] = []

    def peer(source: Path, path: Path, data: Path, signed: bool) -> None:
        assert len(list(feeds.read(data))) == 2
        peers.append(signed)
        shutil.copyfile(source, path)

    found = bench_conformer.rows(fsdd, tmp_path, peer)
    held_out = read_manifest(tmp_path / "digits-held-out" / "manifest.json")
    words = sum(len((utterance.text or "").split()) for utterance in held_out)
    assert len(held_out) == 3
    assert found[0].model == "float"
    assert {row.score for row in found} == {found[0].score}  # all are copies of the float model
    assert (found[0].score.words, found[0].score.differs) == (words, 0)
    assert peers == [False, True]
    quantized = [call for call in calls if call[0] == "quantize"]
    assert len(found) == 1 + len(quantized) + len(peers)
    zero_shot = [call for call in quantized if str(tmp_path / "digits-conformer-kl.npz") in call]
    assert len(zero_shot) == len(bench_conformer.OURS)
    made = len(calls)
    bench_conformer.print_table(fsdd, tmp_path, peer)
    assert (len(calls), len(peers)) == (made, 2)
    assert "WER %" in capsys.readouterr().out


def test_calibration_hears_the_training_half(
    bench_conformer: ModuleType, fsdd: Path, tmp_path: Path
) -> None:
    def seconds(held_out: bool) -> float:
        folder = tmp_path / str(held_out)
        manifest = bench_conformer.strings(fsdd, folder, 4, held_out=held_out, seed=1)
        utterances = read_manifest(manifest)
        counts = [len((u.text or "").split()) for u in utterances]
        durations: list[float] = [soundfile.info(u.audio).duration for u in utterances]
        return sum(durations) / sum(counts)

    # 0.25 s a held-out digit, 0.125 s another; gaps and edges are alike.
    assert seconds(True) - seconds(False) == pytest.approx(0.125, abs=1e-3)
