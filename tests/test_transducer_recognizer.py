"""Text from features by an RNN-T: whole and in chunks, alone and beside others."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_intq.frontend import Floats, Frontend
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, WORD_START
from onnx_intq.transducer_recognizer import TransducerRecognizer
from onnx_intq.transform import IntqError


def features(frames: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((4, frames)).astype(np.float32)


def forget(folder: Path, *keys: str) -> None:
    model = onnx.load(folder / "encoder.onnx")
    kept = [entry for entry in model.metadata_props if entry.key not in keys]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, folder / "encoder.onnx")


@pytest.mark.parametrize("beam", [None, 1, 4])
def test_chunks_give_the_text_of_the_whole(rnnt: Path, beam: int | None) -> None:
    utterances = [features(frames, frames) for frames in (1, 3, 20, 31, 60)]
    whole = TransducerRecognizer(rnnt, threads=1, beam=beam).transcribe(utterances)
    assert len(set(whole)) > 1
    for chunk in (3, 12, 999):
        recognizer = TransducerRecognizer(rnnt, threads=1, beam=beam, chunk=chunk)
        assert recognizer.transcribe(utterances) == whole


@pytest.mark.parametrize("beam", [None, 2])
def test_an_utterance_does_not_depend_on_others(rnnt: Path, beam: int | None) -> None:
    recognizer = TransducerRecognizer(rnnt, threads=1, beam=beam)
    first, second = features(30), features(50, 1)
    together = recognizer.transcribe([first, second])
    assert together == [recognizer.transcribe([each])[0] for each in (first, second)]
    assert recognizer.transcribe([second, first]) == together[::-1]


def test_given_settings_come_before_recorded_ones(rnnt: Path) -> None:
    recorded = TransducerRecognizer(rnnt)
    assert recorded.labels == ("a", " ")
    assert recorded.frontend.features == 4
    frontend = Frontend(features=4, normalize=None)
    given = TransducerRecognizer(rnnt, frontend=frontend, labels=("b", f"{WORD_START}c"))
    assert given.frontend == frontend
    (before,) = recorded.transcribe([features(40)])
    (after,) = given.transcribe([features(40)])
    assert "a" in before
    assert after == before.replace(" ", " c").replace("a", "b")


def test_what_is_neither_recorded_nor_given_is_asked_for(rnnt: Path) -> None:
    forget(rnnt, LABELS_KEY)
    with pytest.raises(IntqError, match=r"does not record its labels .*; give --labels"):
        TransducerRecognizer(rnnt)
    assert TransducerRecognizer(rnnt, labels=("a", "b")).labels == ("a", "b")
    forget(rnnt, FRONTEND_KEY)
    with pytest.raises(IntqError, match=r"does not record its frontend .*; give --frontend"):
        TransducerRecognizer(rnnt, labels=("a", "b"))


def test_bounds_and_features_that_do_not_fit_are_refused(rnnt: Path) -> None:
    with pytest.raises(IntqError, match="beam of 0; expected at least 1"):
        TransducerRecognizer(rnnt, beam=0)
    for chunk in (0, 4, -3):
        with pytest.raises(IntqError, match=f"chunk of {chunk} frames; expected a multiple of 3"):
            TransducerRecognizer(rnnt, chunk=chunk)
    with pytest.raises(IntqError, match=r"'audio_signal' has shape \[1, 5, 9\]; expected"):
        TransducerRecognizer(rnnt).transcribe([np.zeros((5, 9), np.float32)])
    with pytest.raises(IntqError, match=r"expected \[batch, T, U, 2\]"):
        TransducerRecognizer(rnnt, labels=("a",)).transcribe([features(9)])
