"""The whole flow in one call: synthesize where no data is given, calibrate, run the passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import onnx_graphsurgeon as gs

import onnx_intq
from onnx_intq.coded_weights import load_coded
from onnx_intq.graph import (
    check_output,
    convert_opset,
    file_bytes,
    load,
    metadata,
    require_float32,
    save,
    sha256,
    subgraphs,
    with_metadata,
)
from onnx_intq.integer_only import is_integer_only, prove
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.node_patterns import require_matches
from onnx_intq.qdq import QDQ
from onnx_intq.recipes import PREPARE
from onnx_intq.registry import parse, render
from onnx_intq.source import Bar, Source
from onnx_intq.summary import (
    INTEGER,
    Summary,
    describe_float,
    describe_nothing,
    describe_remaining,
    quantized_nodes,
)
from onnx_intq.supply import Supply
from onnx_intq.transform import (
    CheckFailed,
    Context,
    Hook,
    IntqError,
    Pass,
    Report,
    check_order,
    run,
)
from onnx_intq.verify import Drift, SameFunction, small_feeds, well_formed


class NothingQuantizedError(IntqError):
    """The passes should quantize, and found nothing to."""


QDQ_OPSET = 13
"""Oldest opset with scales per channel."""


def quantize(
    model: Path,
    output: Path,
    passes: Sequence[Pass],
    source: Source,
    *,
    observer: str | None = None,
    allow_bn: bool = False,
    allow_float: bool = False,
    verify: bool = False,
    bar: Bar,
) -> Summary:
    """Quantize the file `model` into the file `output`.

    Args:
        model: A float ONNX file; a Q/DQ one if the passes only turn it into integers.
        output: Where to write; another file.
        passes: The recipe; calibration takes place before the first pass that needs it.
        source: Where the ranges come from.
        observer: Which of the calibrated ranges to use; None for the ranges file's choice, else
            that with the fewest word errors on real speech, "mse".
        allow_bn: Let BatchNorms stay that cannot be folded.
        allow_float: Let operators stay float that have no integer form.
        verify: Run the model after every pass, too, and compare.
        bar: Makes a progress bar.

    Raises:
        CheckFailed: BatchNorms or float operators stay that nobody allowed; no file is written.
        IntqError: Bad input, a pass failed, or nothing could be quantized; no file is written.
    """
    check_output(output, model, source.ranges, source.data)
    clock = _Clock()
    graph, coded = load_coded(model)
    _check(graph, passes)
    same = _started(graph, source)
    if _quantizes(passes):  # before data is made: what cannot be converted is refused at once
        convert_opset(graph, QDQ_OPSET)
    hooks: list[Hook] = [well_formed, same] if verify else [well_formed]
    original = with_metadata(graph.copy(), graph) if source.is_synthetic else graph
    supply = Supply(
        source=source, original=original, passes=passes, observer=observer, bar=bar, lap=clock.lap
    )
    ctx = Context(facts=known_facts(graph), coded=coded)
    check_order(passes, ctx.facts | supply.facts())  # before data is made
    clock.lap("load")
    reports = _run_parts(supply, graph, ctx, hooks, allow_bn=allow_bn)
    integer_only = _prove(graph, reports, allow_float=allow_float) if _lowers(passes) else None
    quantized = _counted(graph, passes, reports)
    metadata(graph).update(_provenance(model, passes))
    metadata(graph)["onnx_intq.seed"] = str(source.seed)
    clock.lap("passes")
    moved = same.drift_of(graph)
    save(graph, output)
    clock.lap("save")
    return Summary(
        quantized=quantized,
        left=tuple(entry for r in reports if not _boosts(r.spec) for entry in r.skipped),
        wide=ctx.wide,
        remaining=tuple(ctx.remaining),
        bytes_before=file_bytes(model),
        bytes_after=file_bytes(output),
        drift=moved,
        drift_on="random input" if source.data is None else "the first batch",
        integer_only=integer_only,
        seconds=clock.seconds,
        recipe=render(passes),
        reports=tuple(reports),
    )


def run_recipe(
    model: Path,
    output: Path | None,
    passes: Sequence[Pass],
    source: Source,
    *,
    observer: str | None = None,
    allow_bn: bool = False,
    allow_float: bool = False,
    verify: bool = False,
    bar: Bar,
) -> tuple[list[Report], dict[str, Drift]]:
    """Run any passes over the file `model`, into `output` unless that is None.

    Nothing is synthesized: passes that need data or ranges get them from `source` alone.

    Returns:
        What each pass did, and (with `verify`) the drift after each inexact one.

    Raises:
        CheckFailed: BatchNorms or float operators stay that nobody allowed; no file is written.
        IntqError: Bad input, or a pass failed; no file is written.
    """
    if output is not None:
        check_output(output, model, source.ranges, source.data)
    graph = load(model)
    require_matches(graph, passes)
    ctx = Context(facts=known_facts(graph))
    hooks: list[Hook] = [well_formed]
    drifts: dict[str, Drift] = {}
    if verify:
        same = SameFunction(small_feeds(graph), drifts)
        same.start(graph)
        hooks.append(same)
    supply = Supply(
        source=source, original=graph, passes=passes, observer=observer, bar=bar, lap=_Clock().lap
    )
    given = set[str]() if source.is_synthetic else supply.facts()
    check_order(passes, ctx.facts | given)
    reports: list[Report] = []
    for part in supply.parts(ctx.facts):
        supply.before(part, graph, ctx)
        reports += run(graph, part, ctx, hooks)
    _require_none(reports, allow_bn=allow_bn, allow_float=allow_float)
    if output is not None:
        metadata(graph).update(_provenance(model, passes))
        save(graph, output)
    return reports, drifts


def prepared(model: Path, *, all_float: bool = False) -> gs.Graph:
    """The float model as it is calibrated: constants and BatchNorms folded, identities gone.

    Args:
        model: ONNX.
        all_float: Refuse weights that are on grids or codebooks, too.

    Raises:
        IntqError: Bad input.
    """
    graph, coded = load_coded(model)
    if all_float and coded:
        raise IntqError(
            f"{model}: its weights are integers already; expected a float model; start from the "
            "file it was made of"
        )
    require_float(graph)
    convert_opset(graph, QDQ_OPSET)
    run(graph, parse(PREPARE), Context())
    return graph


def known_facts(graph: gs.Graph) -> set[str]:
    """The facts that hold for a model as it is read: see `transform.FACTS`."""
    ops = {node.op for sub in subgraphs(graph) for node in sub.nodes}
    facts = set() if "BatchNormalization" in ops else {"bn-folded"}
    facts |= {"complete"} if GRIDS_KEY in metadata(graph) else set()
    return facts | ({"quantized"} if "DequantizeLinear" in ops else set())


def require_float(graph: gs.Graph) -> None:
    """Refuse models that are quantized already, or not in float32.

    Raises:
        IntqError: Naming the node or tensor.
    """
    require_float32(graph)
    for node in graph.nodes:
        if node.op in {*QDQ, *INTEGER} or node.op.startswith("QLinear"):
            raise IntqError(
                f"{node.op} {node.name!r}: the model is quantized already; "
                "expected a float model; start from the file it was made of"
            )


def require_qdq(graph: gs.Graph) -> None:
    """Refuse what is integer-only already, not quantized by Q/DQ nodes, or not in float32 between.

    Raises:
        IntqError: Naming the node or tensor.
    """
    require_float32(graph)
    if is_integer_only(graph):
        raise IntqError(
            "the model is integer-only already; expected a float or a Q/DQ model; "
            "start from the file it was made of"
        )
    for node in graph.nodes:
        if node.op.startswith("QLinear"):
            raise IntqError(
                f"{node.op} {node.name!r}: the model is in QOperator format; expected Q/DQ nodes "
                "around float operators; quantize the float model again, with QuantFormat.QDQ"
            )
        if node.op in QDQ and node.domain not in {None, "", "ai.onnx"}:
            raise IntqError(
                f"{node.op} {node.name!r} is of the domain {node.domain!r}; expected the default "
                "domain; quantize the float model again, in opset 21 for 4 or 16 bits"
            )


def is_quantized(model: Path) -> bool:
    """Whether a file holds Q/DQ nodes, and not for its weights alone.

    Raises:
        IntqError: It is no ONNX file.
    """
    graph, _ = load_coded(model)
    return any(node.op in QDQ for node in graph.nodes)


def _run_parts(
    supply: Supply, graph: gs.Graph, ctx: Context, hooks: Sequence[Hook], *, allow_bn: bool
) -> list[Report]:
    """Run the recipe, each part once it is supplied and no BatchNorm stays that nobody allowed."""
    reports: list[Report] = []
    for part in supply.parts(ctx.facts):
        _require_none(reports, allow_bn=allow_bn, allow_float=True)
        supply.before(part, graph, ctx)
        stage = "passes" if reports else "prepare"
        reports += run(graph, part, ctx, hooks)
        supply.lap(stage)
    _require_none(reports, allow_bn=allow_bn, allow_float=True)
    return reports


def _check(graph: gs.Graph, passes: Sequence[Pass]) -> None:
    """Refuse models that do not suit the passes."""
    if any("calibrated" in spec.needs for spec in passes) or not _lowers(passes):
        require_float(graph)
    else:
        require_qdq(graph)
    require_matches(graph, passes)


def _counted(graph: gs.Graph, passes: Sequence[Pass], reports: Sequence[Report]) -> dict[str, int]:
    """Operator type -> nodes that run on integers; at least one where the passes quantize."""
    left = [entry for r in reports if "quantized" in r.spec.gives for entry in r.skipped]
    quantized = quantized_nodes(graph, {name for name, _ in left})
    if _quantizes(passes) and not quantized:
        raise NothingQuantizedError(describe_nothing(left))
    return quantized


def _started(graph: gs.Graph, source: Source) -> SameFunction:
    """What the untouched model computes from the first batch of data, or else random numbers.

    Raises:
        IntqError: It cannot run on that.
    """
    if source.data is not None:
        for batch in source.real(graph):
            same = SameFunction(batch)
            same.start(graph)
            return same
    same = SameFunction(small_feeds(graph))
    try:
        same.start(graph)
    except IntqError as error:
        raise IntqError(f"{error} (tried on random input of 256 frames; give --data)") from error
    return same


def _prove(graph: gs.Graph, reports: Sequence[Report], *, allow_float: bool) -> tuple[str, ...]:
    """What keeps the result from being integer-only, one line each; empty if it is proven."""
    _require_none(reports, allow_bn=True, allow_float=allow_float)
    findings = prove(graph)
    if findings and not allow_float:
        found = findings[0]
        raise CheckFailed(
            f"node {found.node!r}, tensor {found.tensor!r}: {found.why}; "
            "let it stay float with --allow-float"
        )
    return tuple(f"{finding.node}: {finding.why}" for finding in findings)


def _require_none(reports: Sequence[Report], *, allow_bn: bool, allow_float: bool) -> None:
    """Refuse what passes had to leave although it should have gone.

    Raises:
        CheckFailed: With the first such node.
    """
    for allowed, fold in ((allow_bn, True), (allow_float, False)):
        left = [x for r in reports if ("bn-folded" in r.spec.gives) is fold for x in r.remaining]
        if left and not allowed:
            raise CheckFailed(describe_remaining(left) if fold else describe_float(left))


def _boosts(spec: Pass) -> bool:
    """Whether a pass only raises accuracy: what it leaves alone is quantized all the same."""
    return "reference" in spec.needs or ("data" in spec.needs and "calibrated" not in spec.needs)


def _lowers(passes: Sequence[Pass]) -> bool:
    return any("integer" in spec.gives for spec in passes)


def _quantizes(passes: Sequence[Pass]) -> bool:
    return any("quantized" in spec.gives for spec in passes)


def _provenance(model: Path, passes: Sequence[Pass]) -> dict[str, str]:
    return {
        "onnx_intq.version": onnx_intq.__version__,
        "onnx_intq.source_sha256": sha256(model),
        "onnx_intq.recipe": render(passes),
    }


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
