import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = '''
class Flag(Protocol):
    """Bits."""

    ON: int

class Maker(Protocol):
    size: int
    def make(self, shape: Dims, name: str) -> Maker: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class RtxMaker(Maker, Protocol):
    def aim(self, index: int) -> bool: ...

class Library(Protocol):
    __version__: str
    Maker: Callable[[api.Log], api.Maker]
    Flag: api.Flag

class RtxLibrary(Library, Protocol):
    Kind: api.RtxKind
'''
MAKER = {
    "__init__": "__init__(self: t.Maker, log: t.Log) -> None\n",
    "size": "",
    "make": "make(self: t.Maker, shape: tuple[int, str], name: str, more: int = 0) -> t.Maker\n",
    "aim": "aim(*args, **kwargs)\nOverloaded function.\n\n"
    "1. aim(self: t.Maker) -> bool\n\n2. aim(self: t.Maker, index: typing.SupportsInt) -> bool\n",
}
API = {"Flag": {"ON": ""}, "Maker": MAKER, "Kind": {}}


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module("check_trt_api")


def test_names_are_read_with_their_classes_and_parameters(tool: ModuleType) -> None:
    assert [(str(name), name.rtx) for name in tool.names([SOURCE])] == [
        ("Flag", False),
        ("Flag.ON", False),
        ("Maker", False),
        ("Maker.size", False),
        ("Maker.make(shape, name)", False),
        ("Maker", True),
        ("Maker.aim(index)", True),
        ("Maker.__init__(?)", False),
        ("Flag", False),
        ("Kind", True),
    ]


def test_names_that_exist_are_found(tool: ModuleType) -> None:
    assert tool.missing(tool.names([SOURCE]), API) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"Kind": None}, ["Kind"]),
        ({"Flag": {"OFF": ""}}, ["Flag.ON"]),
        ({"Maker": {**MAKER, "make": ""}}, ["Maker.make(shape, name), but no signature"]),
        (
            {"Maker": {**MAKER, "make": "make(self, name: str, shape: int) -> int"}},
            ["Maker.make(shape, name), but (name, shape)"],
        ),
        (
            {"Maker": {**MAKER, "make": "make(self, shape: a, name: b, more: c) -> int"}},
            ["Maker.make(shape, name), but (shape, name, more)"],
        ),
        (
            {"Maker": {**MAKER, "make": "make(self, shape: a) -> int"}},
            ["Maker.make(shape, name), but (shape)"],
        ),
        (
            {"Maker": {**MAKER, "__init__": "__init__(self) -> None"}},
            ["Maker.__init__(?), but ()"],
        ),
    ],
)
def test_names_that_are_missing_or_differ_are_told(
    tool: ModuleType, change: dict[str, Any], expected: list[str]
) -> None:
    api = {name: found for name, found in (API | change).items() if found is not None}
    assert tool.missing(tool.names([SOURCE]), api) == expected


@pytest.mark.slow
def test_every_name_exists_in_every_release(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = tool.main()
    told = capsys.readouterr().out
    assert not failed, told
    lines = told.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *(f"tensorrt {release}" for release in tool.RELEASES),
        "tensorrt_rtx",
    ]
    if skipped := [line for line in lines if "not checked" in line]:
        pytest.skip("; ".join(skipped))
    assert all("names found" in line for line in lines)


@pytest.mark.slow
def test_a_name_that_no_release_has_is_found_missing(tool: ModuleType) -> None:
    wanted = [tool.Name("Builder", "build_engine_of_wishes"), tool.Name("Runtime")]
    wanted.append(tool.Name("IExecutionContext", "set_tensor_address", ("address", "name")))
    found = {release: lacking for release, lacking, _ in tool.check(wanted) if lacking is not None}
    if not found:
        pytest.skip("no release can be checked here")
    first = "Builder.build_engine_of_wishes"
    second = "IExecutionContext.set_tensor_address(address, name), but (name, memory)"
    assert all(lacking == [first, second] for lacking in found.values())


def test_without_network_or_compiler_or_library_a_release_is_skipped(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "find_spec", lambda _: None)
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    assert {reason for _, _, reason in tool.check([])} == {
        "no C compiler",
        "tensorrt_rtx is not installed",
    }
    assert tool.main() == 0


def test_downloads_that_fail_are_told(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: no network\n")

    monkeypatch.setattr(tool.subprocess, "run", failing)
    with pytest.raises(tool.SkipError, match=r"cannot be downloaded \(ERROR: no network\)"):
        tool._download("10.16.1.11", tmp_path)
    wanted = (tmp_path / "requirements.txt").read_text()
    assert wanted.startswith("tensorrt_cu12_bindings==10.16.1.11 --hash=sha256:")

    def slow(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, tool.TIMEOUT)

    monkeypatch.setattr(tool.subprocess, "run", slow)
    with pytest.raises(tool.SkipError, match="no answer from the package index within 60 s"):
        tool._download("10.16.1.11", tmp_path)


def test_bindings_that_cannot_be_imported_are_an_error(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.so").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"tensorrt\.so cannot be imported: ImportError"):
        tool._describe(str(tmp_path / "tensorrt.so"), dict(os.environ))


def test_missing_names_fail_the_check(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [("tensorrt 1", ["A.b", "C"], ""), ("tensorrt 2", [], ""), ("rtx", None, "why")]
    monkeypatch.setattr(tool, "check", lambda _: iter(found))
    assert tool.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["tensorrt 1: no A.b", "tensorrt 1: no C"]
    assert lines[2].startswith("tensorrt 2: all ")
    assert lines[3] == "rtx: not checked: why"
