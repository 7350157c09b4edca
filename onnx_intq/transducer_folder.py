"""An RNN-T on disk: a folder of three ONNX files, which appear together or not at all.

    encoder: audio_signal [batch, mels, time], h, c -> encoded [batch, frames, width], h_out, c_out
    predictor: label int64 [batch, 1], h, c -> predicted [batch, 1, width], h_out, c_out
    joint: encoded [batch, T, width], predicted [batch, U, width] -> logits [batch, T, U, labels+1]

States are float32 [layers, batch, width], zero at the start; the blank is the last class, and the
label that the predictor starts with. encoder.onnx records the front end and the labels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_graphsurgeon as gs

from onnx_intq.files import first_line
from onnx_intq.graph import load
from onnx_intq.transform import IntqError

PARTS = ("encoder", "predictor", "joint")
"""Names of the files, without `.onnx`."""
INPUTS = {
    "encoder": ("audio_signal", "h", "c"),
    "predictor": ("label", "h", "c"),
    "joint": ("encoded", "predicted"),
}
"""What each graph takes."""
SCORES = ("logits",)
"""What the joint gives: the best is searched for."""


def is_folder(model: object) -> bool:
    """Whether a model's path is a folder, as an RNN-T's is."""
    return isinstance(model, str | Path) and Path(model).is_dir()


def part_paths(folder: str | Path) -> dict[str, Path]:
    """The files of an RNN-T, by the names in `PARTS`.

    Raises:
        IntqError: The folder or a file is missing.
    """
    folder = Path(folder)
    paths = {name: folder / f"{name}.onnx" for name in PARTS}
    if not folder.is_dir():
        raise IntqError(f"{folder}: no such folder; expected an RNN-T's; check the path")
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise IntqError(
            f"{folder}: holds no {missing[0]}; expected an RNN-T's {', '.join(PARTS)}, each .onnx; "
            "export it again"
        )
    return paths


def load_parts(folder: str | Path) -> dict[str, gs.Graph]:
    """The graphs of an RNN-T, by the names in `PARTS`.

    Raises:
        IntqError: As for `part_paths`, `graph.load` and `require_inputs`.
    """
    paths = part_paths(folder)
    graphs = {part: load(path) for part, path in paths.items()}
    for part, graph in graphs.items():
        require_inputs(part, paths[part], (tensor.name for tensor in graph.inputs))
    return graphs


def require_inputs(part: str, path: Path, names: Iterable[str]) -> None:
    """Refuse a graph that does not take what its part of an RNN-T should.

    Raises:
        IntqError: With what it takes.
    """
    found = list(names)
    if set(found) != set(INPUTS[part]):
        raise IntqError(
            f"{path}: takes {', '.join(found)}; expected {', '.join(INPUTS[part])}; export the "
            "RNN-T again"
        )


def check_folder_output(output: str | Path, *inputs: str | Path | None) -> None:
    """Refuse an output folder that is, holds or lies in an input's, holds other things, or such.

    Raises:
        IntqError: With what to do instead; also if it has no parent, or the name of an ONNX file.
    """
    output = Path(output)
    if output.is_file():
        raise IntqError(f"{output}: is a file; expected the name of a folder; change -o")
    if output.suffix == ".onnx":
        raise IntqError(
            f"{output}: an RNN-T is three ONNX files; expected the name of a folder; change -o"
        )
    read = [Path(each).resolve() for each in inputs if each is not None]
    if any(output.resolve() in (each, *each.parents) for each in read):
        raise IntqError(f"{output}: output is the input folder; expected another name; change -o")
    if any(each in output.resolve().parents and _is_transducer(each) for each in read):
        raise IntqError(f"{output}: lies in the input folder; expected another place; change -o")
    if others := _foreign(output):
        raise IntqError(
            f"{output}: holds {others[0]}; expected a new folder, or one that an RNN-T was written "
            "to; change -o"
        )
    if not output.absolute().parent.is_dir():
        raise IntqError(f"{output}: its folder does not exist; create it first")


def write_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a new folder beside `path`, then rename it: it appears whole or not at all.

    An RNN-T that is already there is replaced.

    Raises:
        IntqError: `path` holds other things, or the operating system refused.
    """
    check_folder_output(path)
    whole = Path(path).absolute()
    target = whole.with_name(f".{whole.name}-{os.getpid()}")
    try:
        target.mkdir()
        write(target)
        _replace(target, whole)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise IntqError(f"{path}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _replace(target: Path, path: Path) -> None:
    """Rename a folder to one that may exist, which comes back if that fails."""
    before = target.with_name(f"{target.name}.before")
    if path.exists():
        path.rename(before)
    try:
        target.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _is_transducer(folder: Path) -> bool:
    return any((folder / f"{name}.onnx").is_file() for name in PARTS)


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that are no part of an RNN-T; external data belong to their parts."""
    own = {f"{name}.onnx{end}" for name in PARTS for end in ("", ".data")}
    return sorted(p.name for p in folder.iterdir() if p.name not in own) if folder.is_dir() else []
