"""Folders of an RNN-T: found, refused, written whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_intq.transducer_folder import (
    PARTS,
    check_folder_output,
    is_folder,
    load_parts,
    part_paths,
    write_folder,
)
from onnx_intq.transform import IntqError


def write(text: str, *names: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        for name in names or PARTS:
            (folder / f"{name}.onnx").write_text(text)

    return into


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_parts_are_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "r", write("x"))
    assert part_paths(tmp_path / "r") == {n: tmp_path / "r" / f"{n}.onnx" for n in PARTS}
    assert is_folder(tmp_path / "r")
    assert is_folder(str(tmp_path / "r"))
    assert not is_folder(tmp_path / "r" / "joint.onnx")
    assert not is_folder(b"")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"nowhere: no such folder; expected an RNN-T's"):
        part_paths(tmp_path / "nowhere")
    write_folder(tmp_path / "r", write("x", "encoder", "joint"))
    with pytest.raises(IntqError, match=r"r: holds no predictor\.onnx; expected .* encoder, pred"):
        part_paths(tmp_path / "r")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    (tmp_path / "r").mkdir()  # an empty one is as good as none
    for text in ("first", "second"):
        write_folder(folder, write(text))
        assert written(folder) == {f"{name}.onnx": text for name in PARTS}
    (folder / "joint.onnx.data").write_text("weights")
    write_folder(folder, write("third"))
    assert "joint.onnx.data" not in written(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_what_was(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "r"
    if there:
        write_folder(folder, write("before"))

    def broken(target: Path) -> None:
        (target / "encoder.onnx").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(IntqError, match="r: cannot be written: no space left on device; nothing"):
        write_folder(folder, broken)
    assert list(tmp_path.iterdir()) == [folder] * there
    if there:
        assert set(written(folder).values()) == {"before"}


@pytest.mark.parametrize("there", [False, True])
def test_a_last_step_that_fails_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    folder, rename = tmp_path / "r", Path.rename
    if there:
        write_folder(folder, write("before"))

    def failing(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".before"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(IntqError, match="disk on fire"):
        write_folder(folder, write("after"))
    assert list(tmp_path.iterdir()) == [folder] * there
    if there:
        assert set(written(folder).values()) == {"before"}


def test_the_folder_one_stands_in_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").mkdir()
    monkeypatch.chdir(tmp_path / "r")
    write_folder(".", write("x"))
    assert written(tmp_path / "r").keys() == {f"{name}.onnx" for name in PARTS}


def test_outputs_that_would_harm_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_folder(source, write("x"))
    check_folder_output(tmp_path / "out", source, None)
    check_folder_output(source)
    for output, reads, message in (
        (source, source, "in: output is the input folder"),
        (source, source / "joint.onnx", "in: output is the input folder"),
        (source / "joint.onnx", None, r"joint\.onnx: is a file; expected the name of a folder"),
        (tmp_path, None, r"holds in; expected a new folder, or one that an RNN-T"),
        (tmp_path / "no" / "out", None, "its folder does not exist; create it first"),
    ):
        with pytest.raises(IntqError, match=message):
            check_folder_output(output, reads)


def test_an_output_has_a_place_of_its_own(tmp_path: Path, rnnt: Path) -> None:
    with pytest.raises(
        IntqError, match=r"r\.onnx: an RNN-T is three ONNX files; expected the name"
    ):
        check_folder_output(tmp_path / "r.onnx")
    with pytest.raises(IntqError, match=r"rnnt/sub: lies in the input folder; expected another"):
        check_folder_output(rnnt / "sub", rnnt)
    (tmp_path / "speech").mkdir()
    check_folder_output(tmp_path / "speech" / "r", rnnt, tmp_path / "speech")


def test_exchanged_parts_are_named(rnnt: Path) -> None:
    assert list(load_parts(rnnt)) == list(PARTS)
    shutil.copy(rnnt / "joint.onnx", rnnt / "encoder.onnx")
    message = "encoder.onnx: takes encoded, predicted; expected audio_signal, h, c; export the RNN"
    with pytest.raises(IntqError, match=message):
        load_parts(rnnt)
