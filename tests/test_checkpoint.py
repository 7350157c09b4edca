"""Checkpoints are tensors, and belong to one training."""

from pathlib import Path

import pytest
import torch

from onnx_intq import checkpoint
from onnx_intq.transform import IntqError

ABOUT = {"bits": 3, "overrides": (("a", 2),)}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    state = {"a:b/c": torch.arange(6.0).reshape(2, 3).T, "flag": torch.tensor(True)}
    checkpoint.write(tmp_path / "c.pt", state, ABOUT)
    found = checkpoint.read(tmp_path / "c.pt", ABOUT)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c.pt", {}, ABOUT)
    with pytest.raises(IntqError, match="was written with bits 3, not 4; expected the same"):
        checkpoint.read(tmp_path / "c.pt", ABOUT | {"bits": 4})


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x80\x04."])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(IntqError, match="is no checkpoint; expected a file written by train"):
        checkpoint.read(tmp_path / "c.pt", ABOUT)


def test_tensors_without_settings_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(IntqError, match="is no checkpoint"):
        checkpoint.read(tmp_path / "c.pt", ABOUT)
    with pytest.raises(IntqError, match="no such file; expected a checkpoint"):
        checkpoint.read(tmp_path / "d.pt", ABOUT)
