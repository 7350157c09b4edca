import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.graph import sha256
from onnx_intq.ranges import FORMAT, Ranges, read
from onnx_intq.transform import IntqError

LOWS = st.floats(max_value=-1e-300, allow_infinity=False)
HIGHS = st.floats(min_value=0, allow_infinity=False)
TENSORS = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries(
        {"mse": st.tuples(LOWS, HIGHS)}, optional={"minmax": st.tuples(LOWS, HIGHS)}
    ),
    max_size=4,
)
EXAMPLE = Ranges(
    observer="mse",
    tensors={
        "b": {"mse": (-1.5, 2.0), "mse_symmetric": (-1.25, 1.25), "minmax": (-3.0, 4.0)},
        "a": {"mse": (0.0, 0.1), "mse_symmetric": (0.0, 0.25), "minmax": (0.0, 0.5)},
    },
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(TENSORS)
def test_what_is_written_reads_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, dict[str, tuple[float, float]]]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "r.json"
    ranges = Ranges(observer="mse", tensors=tensors)
    ranges.write(path)
    assert read(path) == ranges
    assert ranges.sha256 == sha256(path)


def test_the_file_is_sorted_with_one_line_per_tensor(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text().splitlines() == [
        "{",
        f' "format": "{FORMAT}",',
        ' "observer": "mse",',
        ' "tensors": {',
        '  "a": {"minmax": [0.0, 0.5], "mse": [0.0, 0.1], "mse_symmetric": [0.0, 0.25]},',
        '  "b": {"minmax": [-3.0, 4.0], "mse": [-1.5, 2.0], "mse_symmetric": [-1.25, 1.25]}',
        " }",
        "}",
    ]


def test_select_takes_the_chosen_method_or_another() -> None:
    assert EXAMPLE.select() == {"b": (-1.5, 2.0), "a": (0.0, 0.1)}
    assert EXAMPLE.select(symmetric=True) == {"b": (-1.25, 1.25), "a": (0.0, 0.25)}
    assert EXAMPLE.select("minmax") == {"b": (-3.0, 4.0), "a": (0.0, 0.5)}
    assert EXAMPLE.select("minmax", symmetric=True) == EXAMPLE.select("minmax")


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(IntqError, match="tensor 'b' has no range by 'entropy', only by mse, mse_s"):
        EXAMPLE.select("entropy")


def file_of(folder: Path, **changes: object) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps({**json.loads(EXAMPLE.to_json()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a file of ranges; expected 'format'"),
        ({"observer": 3}, "no 'observer' or no 'tensors'"),
        ({"tensors": []}, "no 'observer' or no 'tensors'"),
        ({"tensors": {"a": [0, 1]}}, r"tensor 'a' has \[0, 1\]; expected method: \[low, high\]"),
        ({"observer": "entropy"}, "r.json: tensor 'a' has no range by 'entropy'"),
        ({"tensors": {"a": {}}}, "r.json: tensor 'a' has no range by 'mse', only by none"),
        *(
            ({"tensors": {"a": {"mse": pair}}}, r"tensor 'a' has mse .*; expected \[low, high\]")
            for pair in (
                *(1, [1], [0, 1, 2], ["0", "1"], [True, 1], [None, 1]),
                *([0, float("nan")], [float("-inf"), 1], [1, 2], [-2, -1], [0, 0]),
            )
        ),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(IntqError, match=message):
        read(file_of(tmp_path, **changes))


def test_files_that_are_missing_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match=r"r.json: cannot be read: No such file"):
        read(tmp_path / "r.json")
    for content in (b"{", b"\xff\xfe", b"[]"):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(IntqError, match=r"r.json: not "):
            read(tmp_path / "r.json")


def test_writing_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntqError, match="cannot be written: No such file or directory"):
        EXAMPLE.write(tmp_path / "missing" / "r.json")
