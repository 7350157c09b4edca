import errno
import hashlib
from pathlib import Path

import onnx
import pytest

from onnx_intq import files
from onnx_intq.files import (
    check_output,
    file_bytes,
    first_line,
    read_structure,
    read_text,
    sha256,
    write_atomically,
)
from onnx_intq.transform import IntqError

MODEL = """<ir_version: 8, opset_import: ["" : 17]> g (bool q, float[2] x) => (float[2] y)
    <float[2] u = {5, 6}> {
        a = Mul(x, u)
        y = If(q) <
            then_branch = yes () => (float[2] t) <float[2] w = {1, 2}> { t = Add(a, w) },
            else_branch = no () => (float[2] e) {
                c = Constant<value = float[2] {3, 4}>()
                e = Add(a, c)
            }
        >
    }"""


def external(path: Path, location: str | None) -> list[Path]:
    """Write a model whose three tensors lie in one file, or each in its own; return all files."""
    model = onnx.parser.parse_model(MODEL)
    for tensor in files._tensors(model.graph):
        if tensor.dims:
            copy = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
            tensor.CopyFrom(copy)
    before = set(path.parent.iterdir())
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=location is not None,
        location=location,
        size_threshold=0,
        convert_attribute=True,
    )
    return [path, *sorted(set(path.parent.iterdir()) - before - {path})]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    beside: list[list[str]] = []

    def write(target: Path) -> None:
        target.write_text("new")
        beside.append([p.name for p in tmp_path.iterdir() if p == path])

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert beside == [[]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), OSError("odd"), OSError()])
def test_a_failure_leaves_nothing_behind_and_the_old_file_untouched(
    tmp_path: Path, error: OSError
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(target: Path) -> None:
        target.write_text("half")
        raise error

    reason = error.strerror or str(error) or "OSError"
    with pytest.raises(IntqError, match=f"a.txt: cannot be written: {reason}; nothing was left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", write)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="cannot be written: No such file or directory"):
        write_atomically(tmp_path / "no" / "a.txt", lambda target: target.write_text(""))


def test_text_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("übung\n", encoding="utf-8")
    assert read_text(path) == "übung\n"
    path.write_bytes(b"\xff")
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(IntqError, match=r"cannot be read: .*; check the path") as caught:
            read_text(wrong)
        assert "\n" not in str(caught.value)


def test_an_output_may_not_be_an_input_by_whatever_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("a.txt").write_text("")
    Path("link.txt").symlink_to("a.txt")
    Path("twin").symlink_to(".")
    for output in ("a.txt", "sub/../a.txt", "link.txt", "twin/a.txt", tmp_path / "a.txt"):
        with pytest.raises(IntqError, match="output is the input file; expected another name"):
            check_output(output, None, "other", tmp_path / "a.txt")
    check_output("b.txt", "a.txt", None)
    check_output(tmp_path / "b.txt", "sub")


def test_an_output_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="its folder does not exist; create it first"):
        check_output(tmp_path / "no" / "b.txt", tmp_path / "a.txt")


def test_an_output_may_not_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="is a folder; expected the name of a file; change -o"):
        check_output(tmp_path)


def test_an_output_may_not_replace_an_inputs_weights(tmp_path: Path) -> None:
    external(tmp_path / "float.onnx", "model.onnx.data")
    for name in ("model.onnx", "model.onnx.data"):
        with pytest.raises(IntqError, match="output is the input file"):
            check_output(tmp_path / name, tmp_path / "float.onnx")
    check_output(tmp_path / "int8.onnx", tmp_path / "float.onnx")


@pytest.mark.parametrize("location", ["weights.bin", None])
def test_external_data_counts(tmp_path: Path, location: str | None) -> None:
    path = tmp_path / "m.onnx"
    parts = external(path, location)
    assert len(parts) == (2 if location else 4)
    assert file_bytes(path) == sum(part.stat().st_size for part in parts)
    before = sha256(path)
    for part in parts[1:]:
        content = part.read_bytes()
        part.write_bytes(content[:-1] + b"\1")
        assert sha256(path) != before
        part.write_bytes(content)
    assert sha256(path) == before


def test_a_file_beside_counts_only_where_the_model_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(onnx.parser.parse_model(MODEL), path)
    (tmp_path / "m.onnx.data").write_text("left over")
    content = path.read_bytes()
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    assert file_bytes(path) == len(content)


def test_other_files_are_hashed_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    content = bytes(range(256)) * 9000
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("no protobuf, but text")
    with pytest.raises(IntqError, match=r"m.onnx: not an ONNX model; expected a protobuf"):
        sha256(path)
    with pytest.raises(IntqError, match=r"cannot be read: .*No such file"):
        read_structure(tmp_path / "missing.onnx")


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
