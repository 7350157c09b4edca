"""RNN-Ts on the command line: exported, evaluated in chunks or with a beam, refused in a line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnx_intq.models.zoo import PRETRAINED
from onnx_intq.speech import LABELS_KEY

Command = Callable[..., tuple[int, str, str]]
DIGITS = PRETRAINED / "digits" / "manifest.json"


def printed(outcome: tuple[int, str, str]) -> Any:
    assert (outcome[0], outcome[2]) == (0, "")
    return json.loads(outcome[1])


def complaint(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_evaluate_reads_a_folder(rnnt: Path, speech: Path, command: Command) -> None:
    options = ("--manifest", speech, "--threads", 1, "--json")
    found = printed(command("evaluate", rnnt, *options, "--against", rnnt))
    assert (found["utterances"], found["words"], found["differs"]) == (2, 4, 0)
    chunks = printed(command("evaluate", rnnt, *options, "--chunk", 6))
    assert chunks["errors"] == found["errors"]
    assert printed(command("evaluate", rnnt, *options, "--beam", 2))["words"] == 4


def test_bad_folders_and_options_are_one_line(
    rnnt: Path, tiny: Path, speech: Path, command: Command
) -> None:
    def refusal(*arguments: object) -> str:
        return complaint(command("evaluate", *arguments, "--manifest", speech))

    assert "chunk of 4 frames; expected a multiple of 3" in refusal(rnnt, "--chunk", 4)
    assert "--chunk has no effect on CTC models" in refusal(tiny, "--chunk", 3)
    assert "--beam has no effect on CTC models" in refusal(tiny, "--beam", 3)
    assert "Invalid value for '--beam': 0" in refusal(rnnt, "--beam", 0)
    assert "speech: holds no encoder.onnx; expected an RNN-T's" in refusal(speech.parent)
    model = onnx.load(rnnt / "encoder.onnx")
    kept = [entry for entry in model.metadata_props if entry.key != LABELS_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, rnnt / "encoder.onnx")
    assert "does not record its labels" in refusal(rnnt)
    shutil.copy(rnnt / "joint.onnx", rnnt / "encoder.onnx")
    assert "encoder.onnx: takes encoded" in refusal(rnnt)
    (rnnt / "joint.onnx").unlink()
    assert "rnnt: holds no joint.onnx; expected an RNN-T's" in refusal(rnnt)


def test_models_that_do_not_belong_together(
    rnnt: Path, tiny: Path, speech: Path, command: Command
) -> None:
    def refusal(*arguments: object) -> str:
        return complaint(command("evaluate", *arguments, "--manifest", speech))

    assert "encoder.onnx: is an RNN-T's encoder; expected a CTC" in refusal(rnnt / "encoder.onnx")
    assert "predictor.onnx: is an RNN-T's predictor" in refusal(rnnt / "predictor.onnx")
    model = onnx.load(tiny)
    for entry in model.metadata_props:
        entry.value = '["b", " "]' if entry.key == LABELS_KEY else entry.value
    onnx.save(model, tiny)
    assert "the models have different labels; expected" in refusal(rnnt, "--against", tiny)
    assert "the models have different labels; expected" in refusal(tiny, "--against", rnnt)
    labels = tiny.with_name("labels.json")
    labels.write_text('["a", " "]')
    given = ("--manifest", speech, "--labels", labels, "--against", tiny)
    assert command("evaluate", rnnt, *given)[0] == 0
    labels.write_text('["a"]')
    wrong = refusal(rnnt, "--labels", labels)
    assert "joint.onnx: gives logits [batch, T, U, 3]; expected [batch, T, U, 2]" in wrong
    assert "is a folder; expected an ONNX model; name a file in it" in complaint(
        command("bench", rnnt)
    )
    assert "rnnt/encoder.onnx" in complaint(command("compare", rnnt, tiny, "--data", speech))


@pytest.mark.slow
def test_the_shipped_rnnt_is_exported_and_hears_the_shipped_speech(
    tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "rnnt"
    assert command("export", "digits-rnnt", "-o", folder) == (0, "", f"wrote {folder}\n")
    options = ("--manifest", DIGITS, "--threads", 1, "--json")
    whole = printed(command("evaluate", folder, *options))
    assert whole["words"] == 79
    assert whole["errors"] <= 5
    chunks = printed(command("evaluate", folder, *options, "--chunk", 24, "--against", folder))
    assert (chunks["errors"], chunks["differs"]) == (whole["errors"], 0)
    assert printed(command("evaluate", folder, *options, "--beam", 4))["errors"] <= 5
