"""Files in and out: whole or not at all, never over an input, with external data counted in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_intq.transform import IntqError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a file beside `path`, then rename it: it appears whole or not at all.

    Raises:
        IntqError: The operating system refused (folder missing, disk full, no permission).
    """
    path = Path(path)
    target = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(target)
        target.replace(path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise IntqError(f"{path}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        target.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """A small UTF-8 text file.

    Raises:
        IntqError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntqError(f"{path}: cannot be read: {first_line(error)}; check the path") from error


def require_model_file(path: str | Path) -> None:
    """Refuse the path of a model that is a folder, or nothing.

    Raises:
        IntqError: With what to do instead.
    """
    path = Path(path)
    if path.is_dir():
        raise IntqError(
            f"{path}: is a folder; expected an ONNX model; name a file in it, of an RNN-T such as "
            f"{path / 'encoder.onnx'}"
        )
    if not path.is_file():
        raise IntqError(f"{path}: no such file; expected an ONNX model; check the path")


def read_structure(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external data, and not checked.

    Raises:
        IntqError: It cannot be read, or is no ONNX file.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise IntqError(f"{path}: cannot be read: {first_line(error)}; check the path") from error
    except Exception as error:
        raise IntqError(f"{path}: not an ONNX model; expected a protobuf ModelProto") from error


def check_output(output: str | Path, *inputs: str | Path | None, option: str = "-o") -> None:
    """Refuse an output that is one of the inputs, or whose folder does not exist.

    The files that hold a model's external data count as well.

    Raises:
        IntqError: With what to do instead; or an input's name ends in .onnx and it is none.
    """
    output = Path(output)
    written = {part.resolve() for part in (output, data_path(output))}
    read = (part for i in inputs if i is not None for part in _parts(Path(i)))
    if any(part.resolve() in written for part in read):
        raise IntqError(
            f"{output}: output is the input file; expected another name; change {option}"
        )
    if output.is_dir():
        raise IntqError(f"{output}: is a folder; expected the name of a file; change {option}")
    if output.exists() and not output.is_file():
        raise IntqError(f"{output}: is no regular file; expected the name of one; change {option}")
    if not output.absolute().parent.is_dir():
        raise IntqError(f"{output}: its folder does not exist; create it first")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, an ONNX file's external data included."""
    digest = hashlib.sha256()
    for part in _parts(Path(path)):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_bytes(path: str | Path) -> int:
    """Size of a file, an ONNX file's external data included."""
    return sum(part.stat().st_size for part in _parts(Path(path)))


def data_path(path: Path) -> Path:
    """Where `graph.save` puts weights that are too many for the file itself."""
    return path.with_name(path.name + ".data")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _parts(path: Path) -> list[Path]:
    """The file, and those that hold its external data."""
    if path.suffix != ".onnx" or not path.is_file():
        return [path]
    model = read_structure(path)
    stored = (tensor for tensor in _tensors(model.graph) if uses_external_data(tensor))
    locations = dict.fromkeys(ExternalDataInfo(tensor).location for tensor in stored)
    return [path, *(part for name in locations if (part := path.parent / name).is_file())]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor, those of nodes and bodies included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for body in (attribute.g, *attribute.graphs):
                yield from _tensors(body)
