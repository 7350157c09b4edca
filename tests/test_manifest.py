import json
from pathlib import Path

import pytest

from onnx_intq.manifest import Utterance, read_manifest
from onnx_intq.transform import IntqError


def manifest(folder: Path, *lines: object, name: str = "manifest.json") -> Path:
    """A manifest with these lines, and an audio file a.wav beside it."""
    (folder / "a.wav").touch()
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_lines_become_utterances(tmp_path: Path) -> None:
    elsewhere = tmp_path / "b.flac"
    elsewhere.touch()
    path = manifest(
        tmp_path,
        {"audio_filepath": "a.wav", "duration": 1.234, "text": "Hé", "split": "dev"},
        "",
        {"audio_filepath": str(elsewhere), "offset": 2, "duration": 0.5, "lang": "en"},
    )
    assert read_manifest(path) == (
        Utterance(audio=tmp_path / "a.wav", text="Hé", split="dev"),
        Utterance(audio=elsewhere, offset=2, duration=0.5),
    )


def test_a_folder_of_audio_stands_for_a_manifest(tmp_path: Path) -> None:
    for name in ("b.WAV", "a.flac", "notes.txt"):
        (tmp_path / name).touch()
    assert [u.audio.name for u in read_manifest(tmp_path)] == ["a.flac", "b.WAV"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: invalid JSON"),
        ("[]", "line 2: not a JSON object"),
        ({"text": "a"}, "line 2: audio_filepath is None"),
        ({"audio_filepath": ""}, "line 2: audio_filepath is ''"),
        ({"audio_filepath": "none.wav"}, "none.wav; correct audio_filepath"),
        ({"audio_filepath": "a.wav", "text": 1}, "line 2: text is 1; expected a string"),
        ({"audio_filepath": "a.wav", "offset": -1}, "line 2: offset is -1; expected seconds"),
        ({"audio_filepath": "a.wav", "offset": True}, "line 2: offset is True"),
        ({"audio_filepath": "a.wav", "offset": 0, "duration": "1"}, "line 2: duration is '1'"),
        ('{"audio_filepath": "a.wav", "offset": NaN}', "line 2: offset is nan"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    path = manifest(tmp_path, {"audio_filepath": "a.wav"}, line)
    with pytest.raises(IntqError) as caught:
        read_manifest(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line 2")


def test_empty_missing_and_binary_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty", "holds no utterances"),
        ("folder", "holds no utterances"),
        ("missing", "No such file"),
        ("binary", "not text; expected a manifest"),
    ):
        if name == "empty":
            manifest(tmp_path, "", " ", name=name)
        with pytest.raises(IntqError, match=message):
            read_manifest(tmp_path / name)
