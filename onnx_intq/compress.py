"""Weights of less than 8 bits in a file that is really smaller: codebooks, packed indices.

Of a float model, weights are coded first (`quantize_codebook`), all else stays float. Of a model
whose weights are integers already, nothing changes but how they are stored (`pack_weights`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import onnx_graphsurgeon as gs

import onnx_intq
from onnx_intq.codebook import quantizable_weights
from onnx_intq.graph import (
    check_output,
    convert_opset,
    file_bytes,
    load,
    metadata,
    require_float32,
    save,
    sha256,
    with_metadata,
)
from onnx_intq.packing import decoded, unpack
from onnx_intq.qdq import QDQ, nodes
from onnx_intq.recipes import PREPARE, compression
from onnx_intq.registry import parse, render
from onnx_intq.source import Bar, Source
from onnx_intq.summary import INTEGER
from onnx_intq.transducer_folder import (
    check_folder_output,
    is_folder,
    load_parts,
    part_paths,
    write_folder,
)
from onnx_intq.transform import Context, IntqError, Report, run
from onnx_intq.verify import Drift, SameFunction, small_feeds, well_formed

QDQ_OPSET = 13
"""Oldest opset with scales per channel."""
MODEL = "model"
"""In place of a part's name, where there is one file."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the weights of a float model are coded.

    Attributes:
        bits: 1..8; None packs what is on integers already.
        kind: Of codebook, see `codebook.KINDS`.
        keep: Glob patterns of nodes whose weights stay float.
        overrides: (glob pattern of node names, bits) pairs; the last that matches wins.
    """

    bits: int | None = None
    kind: str = "lloyd"
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What was done to a file.

    Attributes:
        coded: Weights that were float and lie on a codebook now.
        packed: Bits of an index -> constants that are packed so.
        left: (node, reason) for weights that stay float.
        bytes_before, bytes_after: File sizes.
        drift: Of the outputs, on random input.
        recipe: The passes, as text that reads back.
    """

    coded: int
    packed: Mapping[int, int]
    left: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int
    drift: Drift
    recipe: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "coded": self.coded,
            "packed": {str(bits): count for bits, count in self.packed.items()},
            "left": self.left,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "drift": {"largest": self.drift.largest, "sqnr": self.drift.sqnr},
            "recipe": self.recipe,
        }


def compress(
    model: Path, output: Path, settings: Settings, source: Source, *, bar: Bar
) -> dict[str, Compression]:
    """Compress a file, or the three of an RNN-T's folder.

    Args:
        model: ONNX.
        output: Where to write: another file, or for a folder another folder.
        settings: How to code float weights.
        source: Real feeds, by which roundings are chosen; without, the nearest centroids are.
        bar: Makes a progress bar.

    Returns:
        What was done, by the parts' names; `MODEL` for a file.

    Raises:
        IntqError: Bad input; bits for a model that has none to choose, none for one that needs
            some; nothing to pack. Nothing is written.
    """
    if not is_folder(model):
        check_output(output, model, source.data)
        _require_matches([model], settings)
        return {MODEL: _compress(model, output, settings, source, bar, alone=True)}
    check_folder_output(output, model)
    paths, graphs, done = part_paths(model), load_parts(model), dict[str, Compression]()
    if source.data is not None:
        raise IntqError(
            f"{model}: feeds for an RNN-T, which is three models; expected none; leave out --data"
        )

    if settings.bits is None and not any(map(is_stored, graphs.values())):
        raise _float(model)
    _require_matches(list(paths.values()), settings)

    def write(folder: Path) -> None:
        for part, path in paths.items():
            target = folder / path.name
            done[part] = _compress(path, target, settings, source, bar, alone=False)
        if settings.bits is None and not any(each.packed for each in done.values()):
            raise _nothing(model)

    write_folder(output, write)
    return done


def is_stored(graph: gs.Graph) -> bool:
    """Whether weights are on integers already."""
    return any(nodes(graph, *QDQ, *INTEGER, "QLinearConv", "QLinearMatMul"))


def _compress(
    model: Path, output: Path, settings: Settings, source: Source, bar: Bar, *, alone: bool
) -> Compression:
    graph = load(model)
    unpack(graph)
    _check(graph, model, settings, alone=alone)
    same = SameFunction(small_feeds(graph))
    same.start(graph)
    ctx = Context()
    reports = _run(graph, ctx, settings, source, bar)
    recipe = render([report.spec for report in reports])
    packed = Counter(each.bits for each in decoded(graph))
    if alone and settings.bits is None and not packed:
        raise _nothing(model)
    metadata(graph).update(
        {
            "onnx_intq.version": onnx_intq.__version__,
            "onnx_intq.source_sha256": sha256(model),
            "onnx_intq.recipe": recipe,
        }
    )
    moved = same.drift_of(graph)
    save(graph, output)
    return Compression(
        coded=sum(r.changes for r in reports if "quantized" in r.spec.gives),
        packed=dict(sorted(packed.items())),
        left=tuple(s for r in reports if "quantized" in r.spec.gives for s in r.skipped),
        bytes_before=file_bytes(model),
        bytes_after=file_bytes(output),
        drift=moved,
        recipe=recipe,
    )


def _run(
    graph: gs.Graph, ctx: Context, settings: Settings, source: Source, bar: Bar
) -> list[Report]:
    if settings.bits is None:
        return run(graph, parse(compression()), ctx, [well_formed])
    convert_opset(graph, QDQ_OPSET)
    if source.data is not None:
        ctx.feeds = source.batches(graph, metadata(graph), bar)
        ctx.facts.add("data")
    reports = run(graph, parse(PREPARE), ctx, [well_formed])
    if source.data is not None:
        ctx.reference = with_metadata(graph.copy(), graph)
        ctx.facts.add("reference")
    chosen = compression(
        settings.bits,
        kind=settings.kind,
        keep=settings.keep,
        overrides=settings.overrides,
        boost=source.data is not None,
    )
    return reports + run(graph, parse(chosen), ctx, [well_formed])


def _check(graph: gs.Graph, model: Path, settings: Settings, *, alone: bool) -> None:
    """Refuse bits for weights that have them, and none for float weights."""
    require_float32(graph)
    stored = is_stored(graph)
    if stored and settings.bits is not None:
        raise IntqError(
            f"{model}: its weights are integers already, which can only be packed as they are; "
            "expected a float model with --bits; leave it out, or start from the float model"
        )
    if alone and not stored and settings.bits is None:
        raise _float(model)


def _require_matches(paths: Sequence[Path], settings: Settings) -> None:
    """Refuse patterns of node names that name nothing."""
    patterns = [*settings.keep, *(pattern for pattern, _ in settings.overrides)]
    if not patterns:
        return
    names = [name for p in paths for site in quantizable_weights(load(p)) for name in site.nodes]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = f", such as {names[0]!r}" if names else ""
            raise IntqError(
                f"no node matches {pattern!r}; expected names or patterns of nodes with float "
                f"weights{example}; correct it"
            )


def _float(model: Path) -> IntqError:
    return IntqError(
        f"{model}: its weights are float; expected how many bits to give them; add --bits"
    )


def _nothing(model: Path) -> IntqError:
    return IntqError(
        f"{model}: nothing can be packed; expected weights of less than 8 bits, in int8, at most "
        "128 distinct ones; quantize the float model to fewer bits"
    )
