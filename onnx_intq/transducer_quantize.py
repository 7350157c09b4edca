"""Quantizes an RNN-T: its three graphs by one recipe, on feeds that the float graphs make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from onnx_intq.coded_weights import load_coded
from onnx_intq.graph import load
from onnx_intq.lowering import operand
from onnx_intq.node_patterns import matching
from onnx_intq.quantize import NothingQuantizedError, quantize
from onnx_intq.source import Bar, Source
from onnx_intq.summary import Summary
from onnx_intq.transducer_feeds import recorded_feeds
from onnx_intq.transducer_folder import (
    INPUTS,
    check_folder_output,
    part_paths,
    require_inputs,
    write_folder,
)
from onnx_intq.transform import IntqError, Pass, Range


def quantize_folder(
    folder: Path,
    output: Path,
    passes: Callable[[Path], Sequence[Pass]],
    source: Source,
    *,
    bar: Bar,
    **options: Any,
) -> dict[str, Summary | str]:
    """Quantize the RNN-T in `folder` into the folder `output`, which appears whole or not at all.

    Args:
        folder: Float graphs; Q/DQ ones if the passes only turn them into integers.
        output: Another folder.
        passes: The recipe of a graph, by its file.
        source: Its data is speech, decoded by the float graphs; without data there is noise.
        bar: Makes a progress bar.
        options: As for `quantize`.

    Returns:
        By part, what was done; or why nothing was: the file is then copied.

    Raises:
        IntqError: As for `quantize`, with the file's name; or the source is a file of ranges.
    """
    paths = part_paths(folder)
    check_folder_output(output, folder, source.data)
    if source.ranges is not None:
        raise IntqError(
            f"--ranges {source.ranges} for an RNN-T, which has three graphs; expected speech; "
            "give --data"
        )
    if source.data is not None and source.data.suffix == ".npz":
        raise IntqError(
            f"{source.data}: feeds for an RNN-T, whose graphs make each other's from speech; "
            "expected a manifest or a folder of audio; give that"
        )
    recipes = _recipes(paths, passes)
    done: dict[str, Summary | str] = {}
    feeds: dict[str, Path] = {}

    def write(target: Path) -> None:
        given: dict[str, Range] = {}
        for part, path in paths.items():
            fixed = {name: given[name] for name in INPUTS[part] if name in given}
            own = Source(data=feeds.get(part), seed=source.seed, fixed=fixed)
            done[part] = _part(path, target, recipes[part], own, bar, options)
            given |= output_ranges(load(target / path.name))

    with ExitStack() as stack:
        if source.data is not None or any(map(_calibrates, recipes.values())):
            with bar("feeds") as tick:
                made = recorded_feeds(
                    folder, source.data, frontend=source.frontend, seed=source.seed, progress=tick
                )
                feeds |= stack.enter_context(made)
        write_folder(output, write)
    return done


def output_ranges(graph: gs.Graph) -> dict[str, Range]:
    """What the outputs of a graph can be, by name: of those on a grid of 8 bits.

    A graph that is fed with them, and has these ranges, takes them without rounding.
    """
    found = dict[str, Range]()
    for tensor in graph.outputs:
        known = operand(tensor)
        if known is not None and known.grid.bits == 8:
            found[tensor.name] = known.low, known.high
    return found


def _recipes(
    paths: Mapping[str, Path], passes: Callable[[Path], Sequence[Pass]]
) -> dict[str, list[Pass]]:
    """The recipe of each part, its patterns of node names those that name something there."""
    graphs = [load_coded(path)[0] for path in paths.values()]
    for (part, path), graph in zip(paths.items(), graphs, strict=True):
        require_inputs(part, path, (tensor.name for tensor in graph.inputs))
    found = matching(graphs, [passes(path) for path in paths.values()])
    return dict(zip(paths, found, strict=True))


def _calibrates(passes: Sequence[Pass]) -> bool:
    return any("calibrated" in each.needs for each in passes)


def _part(
    path: Path,
    target: Path,
    passes: Sequence[Pass],
    source: Source,
    bar: Bar,
    options: dict[str, Any],
) -> Summary | str:
    try:
        return quantize(path, target / path.name, passes, source, bar=bar, **options)
    except NothingQuantizedError as error:
        shutil.copy(path, target / path.name)
        return str(error)
    except IntqError as error:
        raise type(error)(f"{path.name}: {error}") from error
