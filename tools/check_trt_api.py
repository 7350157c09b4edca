"""Looks every TensorRT name that the code uses up in NVIDIA's bindings, release by release.

The names, with their parameters, are those of `onnx_intq/engine_api.py` and `engine_library.py`;
mypy lets the code use no others. TensorRT's bindings are on PyPI, the libraries they are linked
with are not: empty ones stand in for them. That is enough to import the bindings, which then tell
their classes, members and signatures, and call nothing. TensorRT-RTX is asked where installed.

    python tools/check_trt_api.py

Exit code 1 if a name is missing. What cannot be checked (no network, no C compiler) is said so.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("onnx_intq/engine_api.py", "onnx_intq/engine_library.py")
PACKAGE = "tensorrt_cu12_bindings"
RELEASES: Mapping[str, tuple[str, ...]] = {
    "10.13.3.9": (
        "33aa9d104c04b008871645a97bd8a1a02279cf498d251df5e767d9d5183e0646",
        "193174cd0aa5ec7d63943d8d3f84ca9ec525477a9db3a9100bf2f77071b3fae8",
        "90c7d502682d868a918665f1035b4acb07254bcd76cc551febea9a7009ee6269",
    ),
    "10.16.1.11": (
        "150ef2b672487e29a8ea916353467c3e199994fb33589167e3641a928e243aa7",
        "8e339335e7255b3fb3954eca61b4acbbdfcf7b28505bd711914519647ba310c8",
        "f2a08cedfa48e300720e5bed070a45e390ea67dbcf475ffce725d10e0a2b3ba7",
    ),
    "11.4.0.106": (
        "e2ab48f316bbff6a7a44a30e94a9ceb0d2cf6645ff39feadecfa68d7cb7a94bf",
        "6490518c9e072d57e0a815ad80b103596933efe776ffa61766ef31c25dbd8b39",
        "37bba007c65325087db7409d4ab48e460b4be4abcf99cb3e8b6979642f33c521",
    ),
}
"""The oldest release that setup.cfg allows, and the newest of each major version; SHA-256 of the
wheels for x86-64 and Python 3.11, 3.12 and 3.13: what is imported is what was looked at.
"""
RTX = "tensorrt_rtx"
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""Functions of the libraries whose addresses the bindings take."""
DESCRIBE = """
import importlib, importlib.machinery, importlib.util, json, os, sys
place = sys.argv[1]
if place.endswith(".so"):
    sys.setdlopenflags(os.RTLD_LAZY)
    loader = importlib.machinery.ExtensionFileLoader("tensorrt", place)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("tensorrt", loader))
    loader.exec_module(module)
else:
    module = importlib.import_module(place)
classes = {name: found for name, found in vars(module).items() if isinstance(found, type)}
members = {
    name: {member: getattr(found, member).__doc__ or "" for member in dir(found)}
    for name, found in classes.items()
}
json.dump(members, sys.stdout)
"""
TIMEOUT = 60
"""Seconds for a download or an import."""

Api = Mapping[str, Mapping[str, str]]
"""Class -> member -> its documentation, which begins with its signatures."""


class SkipError(Exception):
    """A release cannot be checked here; the message says why."""


@dataclass(frozen=True)
class Name:
    """A name the code uses.

    Attributes:
        owner: Its class, as the library calls it.
        member: Of that class; "" for the class itself.
        parameters: Of a method, `self` left out; "?" for any name. None for an attribute.
        rtx: Whether TensorRT-RTX alone has it.
    """

    owner: str
    member: str = ""
    parameters: tuple[str, ...] | None = None
    rtx: bool = False

    def __str__(self) -> str:
        """As one would write it."""
        parameters = "" if self.parameters is None else f"({', '.join(self.parameters)})"
        return f"{self.owner}{'.' if self.member else ''}{self.member}{parameters}"


def names(sources: Sequence[str]) -> list[Name]:
    """The names in Python sources: of classes `Rtx...` those that TensorRT-RTX alone has."""
    trees = [ast.parse(source) for source in sources]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for found in classes for name in _names(found)]


def missing(wanted: Sequence[Name], api: Api) -> list[str]:
    """Which names the bindings have not, and what they have instead."""
    return [found for name in wanted if (found := _missing(name, api))]


def signatures(member: str, text: str) -> list[list[tuple[str, bool]]]:
    """(parameter, whether it has a default) lists, `self` left out, of every overload."""
    found = re.findall(rf"^(?:\d+\. )?{re.escape(member)}\((.*)\) ->", text, re.MULTILINE)
    return [
        [(part.partition(":")[0].strip(), "=" in part) for part in _split(parameters)[1:]]
        for parameters in found
    ]


def published(release: str, folder: Path) -> Api:
    """What the bindings of a release of TensorRT hold; `folder` takes the downloads.

    Raises:
        SkipError: There is no network, no such wheel for this Python, or no C compiler.
    """
    library = _stub(folder)
    for name in LIBRARIES:
        link = folder / f"{name}.so.{release.partition('.')[0]}"
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    wheel = _download(release, folder)
    with zipfile.ZipFile(wheel) as archive:
        bindings = archive.extract("tensorrt_bindings/tensorrt.so", folder / release)
    return _describe(bindings, {**os.environ, "LD_LIBRARY_PATH": str(folder)})


def installed() -> Api:
    """What the bindings of TensorRT-RTX hold.

    Raises:
        SkipError: It is not installed.
    """
    if find_spec(RTX) is None:
        raise SkipError(f"{RTX} is not installed")
    return _describe(RTX, dict(os.environ))


def check(wanted: Sequence[Name]) -> Iterator[tuple[str, list[str] | None, str]]:
    """(release, missing names or None if it was skipped, reason) of every release."""
    common = [name for name in wanted if not name.rtx]
    with tempfile.TemporaryDirectory() as name:
        for release in RELEASES:
            try:
                api = published(release, Path(name))
            except SkipError as skipped:
                yield f"tensorrt {release}", None, str(skipped)
            else:
                yield f"tensorrt {release}", missing(common, api), ""
    try:
        yield RTX, missing(wanted, installed()), ""
    except SkipError as skipped:
        yield RTX, None, str(skipped)


def main() -> int:
    """Check and report; 1 if a name is missing."""
    wanted = names([(ROOT / source).read_text(encoding="utf-8") for source in SOURCES])
    failed = False
    for release, lacking, reason in check(wanted):
        if lacking is None:
            print(f"{release}: not checked: {reason}")
        elif lacking:
            failed = True
            print("\n".join(f"{release}: no {name}" for name in lacking))
        else:
            used = [name for name in wanted if release == RTX or not name.rtx]
            print(f"{release}: all {len(used)} names found")
    return int(failed)


def _names(found: ast.ClassDef) -> Iterator[Name]:
    rtx, owner = found.name.startswith("Rtx"), found.name.removeprefix("Rtx")
    is_module = owner == "Library"
    if not is_module:
        yield Name(owner, rtx=rtx)
    for node in found.body:
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("__"):
                parameters = tuple(argument.arg for argument in node.args.args[1:])
                yield Name(owner, node.name, parameters, rtx)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            if is_module and not name.startswith("__"):
                yield _of_module(name, node.annotation, rtx)
            elif not name.startswith("__"):
                yield Name(owner, name, rtx=rtx)


def _of_module(name: str, annotation: ast.expr, rtx: bool) -> Name:
    """A class of the library; one that is called must take that many arguments."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Callable":
        assert isinstance(annotation.slice, ast.Tuple)  # noqa: S101 - by Callable's grammar
        arguments = annotation.slice.elts[0]
        assert isinstance(arguments, ast.List)  # noqa: S101
        return Name(name, "__init__", ("?",) * len(arguments.elts), rtx)
    return Name(name, rtx=rtx)


def _missing(name: Name, api: Api) -> str:
    members = api.get(name.owner)
    if members is None or (name.member and name.member not in members):
        return str(name)
    if name.parameters is None:
        return ""
    found = signatures(name.member, members[name.member])
    if any(_accepts(parameters, name.parameters) for parameters in found):
        return ""
    told = " or ".join(f"({', '.join(p for p, _ in parameters)})" for parameters in found)
    return f"{name}, but {told or 'no signature'}"


def _accepts(parameters: Sequence[tuple[str, bool]], given: Sequence[str]) -> bool:
    return (
        len(parameters) >= len(given)
        and all(g in {"?", p} for (p, _), g in zip(parameters, given, strict=False))
        and all(default for _, default in parameters[len(given) :])
    )


def _split(parameters: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "[(") - (character in "])")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _stub(folder: Path) -> Path:
    """A library with the functions of `SYMBOLS`, which do nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SkipError("no C compiler")
    source, library = folder / "stub.c", folder / "stub.so"
    source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in SYMBOLS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def _download(release: str, folder: Path) -> Path:
    hashes = " ".join(f"--hash=sha256:{value}" for value in RELEASES[release])
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={release} {hashes}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    try:
        done = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired as error:
        raise SkipError(f"no answer from the package index within {TIMEOUT} s") from error
    found = list(folder.glob(f"{PACKAGE}-{release}-*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SkipError(f"cannot be downloaded ({lines[-1] if lines else 'no wheel'})")
    return found[0]


def _describe(place: str, environment: Mapping[str, str]) -> Api:
    """Import bindings in a process of their own, for two cannot be in one.

    Raises:
        RuntimeError: They cannot be imported: `SYMBOLS` or `LIBRARIES` lack something.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DESCRIBE, place],
        env=dict(environment),
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{place} cannot be imported: {lines[-1]}")
    found: Api = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
