import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_intq.archive import Batch, batches, entries, write
from onnx_intq.transform import IntqError

ARRAYS = st.one_of(
    *(
        hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
        for dtype in (np.int64, np.uint8, np.bool_)
    ),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=4),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)


def ones(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones(2, np.float32) for name in names}


def pack(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=allow_pickle)
    return file.getvalue()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.fixed_dictionaries({"a/b": ARRAYS, "length": ARRAYS}), min_size=1, max_size=4))
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, np.ndarray]]
) -> None:
    path = tmp_path_factory.mktemp("feeds") / "f.npz"
    assert write(path, iter(given)) == len(given)
    found = list(batches(entries(path)))
    assert len(found) == len(given)
    for was, now in zip(given, found, strict=True):
        assert list(now) == ["a/b", "length"]
        for name, values in was.items():
            assert now[name].dtype == values.dtype
            np.testing.assert_array_equal(now[name], values, strict=True)


def test_the_same_batches_give_the_same_bytes(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "1.npz", [{"x": x, "n": np.array(3)}])
    write(tmp_path / "2.npz", [{"n": np.array(3), "x": np.asfortranarray(x)}])
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_numpy_reads_and_writes_the_same_format(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    arrays: dict[str, Any] = {"0001/x": np.array([2.0]), "0000/x": np.array([1.0])}
    np.savez_compressed(path, **arrays)
    assert [batch["x"][0] for batch in batches(entries(path))] == [1, 2]
    write(path, [ones("x")] * 3)
    with np.load(path) as archive:
        assert sorted(archive.files) == ["0000/x", "0001/x", "0002/x"]


def test_batches_beyond_four_digits_keep_their_order(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "f.npz",
        {f"{number}/x.npy": npy(np.array([number])) for number in (10000, 9999, 10001)},
    )
    assert [batch["x"][0] for batch in batches(entries(path))] == [9999, 10000, 10001]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    objects = npy(np.array([{"a": 1}]), allow_pickle=True)
    for members, message in (
        ({"x.npy": b""}, "key 'x'; expected <batch>/<input name>"),
        ({"0000/x": b""}, "key '0000/x'; expected"),
        ({"000/x.npy": b""}, "key '000/x'; expected"),
        ({}, "holds no batches"),
        ({"0000/x.npy": b"text"}, "batch 0000: input 'x' cannot be read (EOF"),
        ({"0000/x.npy": npy(np.ones(9))[:-1]}, "batch 0000: input 'x' cannot be read"),
        ({"0000/x.npy": objects}, "cannot be read (Object arrays cannot be loaded"),
    ):
        pack(path, members)
        with pytest.raises(IntqError) as caught:
            list(batches(entries(path)))
        assert message in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    with pytest.raises(IntqError, match="cannot be read"):
        entries(path)
    for content in (b"", b"not a zip file"):
        path.write_bytes(content)
        with pytest.raises(IntqError, match=r"not an \.npz file"):
            entries(path)


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    write(path, [{"x": np.arange(1000)}])
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntqError, match="batch 0000: input 'x' cannot be read"):
        list(batches(entries(path)))


def test_every_batch_must_have_the_inputs_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    message = "batch 0001 holds x; expected n, x as in .*batch 0000; complete it"
    pack(path, {k: npy(np.ones(1)) for k in ("0000/x.npy", "0000/n.npy", "0001/x.npy")})
    with pytest.raises(IntqError, match=message):
        entries(path)
    with pytest.raises(IntqError, match=message):
        write(path, [ones("x", "n"), ones("x")])


BAD: list[tuple[Batch, str]] = [
    ({}, "batch 0001: holds no inputs"),
    ({"x": np.array([1, np.nan])}, "batch 0001: input 'x' holds NaN or infinity"),
    ({"x": np.array(-np.inf, np.float32)}, "batch 0001: input 'x' holds NaN or infinity"),
    ({"x": np.zeros((1, 64, 0))}, r"batch 0001: input 'x' is empty, \[1, 64, 0\]"),
    ({"x": np.array(["a"])}, "batch 0001: input 'x' is <U1; expected numbers"),
    ({"x": np.array([None])}, "batch 0001: input 'x' is object; expected numbers"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_values_are_refused_and_nothing_is_left(
    tmp_path: Path, bad: Batch, message: str
) -> None:
    expected = message if bad else "batch 0001 holds ; expected x"
    with pytest.raises(IntqError, match=expected):
        write(tmp_path / "f.npz", [ones("x"), bad])
    with pytest.raises(IntqError, match=message.replace("0001", "0000")):
        write(tmp_path / "f.npz", [bad])
    assert not list(tmp_path.iterdir())


def test_bad_values_are_found_when_reading(tmp_path: Path) -> None:
    path = pack(tmp_path / "f.npz", {"0003/x.npy": npy(np.array([np.nan]))})
    with pytest.raises(IntqError, match=r"f\.npz: batch 0003: input 'x' holds NaN or infinity"):
        list(batches(entries(path)))


def test_no_batches_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="no batches to write"):
        write(tmp_path / "f.npz", [])
    with pytest.raises(IntqError, match="cannot be written: No such file or directory"):
        write(tmp_path / "missing" / "f.npz", [ones("x")])
    assert not list(tmp_path.iterdir())
