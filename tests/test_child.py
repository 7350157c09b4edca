import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from onnx_intq.child import ChildError, ask, serve
from onnx_intq.transform import IntqError

MODULE = """
import os, signal, sys, time
from pathlib import Path
from onnx_intq.child import serve
from onnx_intq.transform import IntqError

def answer(request, folder):
    print("noise on stdout")
    if request["do"] == "refuse":
        raise IntqError("no such thing")
    if request["do"] == "fail":
        raise ValueError("broken")
    if request["do"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request["do"] == "sleep":
        time.sleep(60)
    if request["do"] == "exit":
        sys.exit(3)
    if request["do"] == "leave":
        os._exit(0)
    (folder / "file").write_bytes(b"more")
    return {"got": request, "path": sys.path, "folder": os.getcwd()}

serve(Path(sys.argv[1]), answer)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "served.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def test_a_child_answers_and_may_leave_files(folder: Path) -> None:
    request = {"do": "work", "text": "ü\n", "numbers": [1, 2.5, None]}
    assert ask("served", request, folder, 60)["got"] == request
    assert (folder / "file").read_bytes() == b"more"


def test_a_child_finds_what_its_parent_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served.py").write_text("raise ImportError('taken from the current folder')")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(ChildError, match="taken from the current folder"):
        ask("served", {"do": "work"}, folder, 60)
    monkeypatch.setattr(sys, "path", sys.path[1:])
    answer = ask("served", {"do": "work"}, folder, 60)
    assert str(tmp_path / "code") in answer["path"]
    assert str(tmp_path) not in answer["path"]


def test_errors_raised_on_purpose_are_handed_on(folder: Path) -> None:
    with pytest.raises(IntqError, match=r"^no such thing$") as caught:
        ask("served", {"do": "refuse"}, folder, 60)
    assert not isinstance(caught.value, ChildError)


@pytest.mark.parametrize(
    ("action", "timeout", "message"),
    [
        ("fail", 60, r"^failed \(ValueError: broken\)$"),
        ("exit", 60, r"^failed \(3\)$"),
        ("crash", 60, r"^crashed \(SIGSEGV\)$"),
        ("leave", 60, r"^ended without an answer$"),
        ("sleep", 0.5, r"^did not end within 0\.5 s$"),
    ],
)
def test_no_answer_is_told_in_words(
    folder: Path, action: str, timeout: float, message: str
) -> None:
    with pytest.raises(ChildError, match=message):
        ask("served", {"do": action}, folder, timeout)


def test_serve_writes_answers_and_errors(tmp_path: Path) -> None:
    def answer(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if request["n"] < 0:
            raise IntqError("too small")
        return {"twice": 2 * request["n"]}

    for n, expected in ((4, {"twice": 8}), (-1, {"error": "too small"})):
        (tmp_path / "request.json").write_text(json.dumps({"n": n}))
        serve(tmp_path, answer)
        assert json.loads((tmp_path / "answer.json").read_text()) == expected
