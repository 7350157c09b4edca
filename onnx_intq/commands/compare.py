"""`onnx-intq compare`: find the layer at which the error of a quantized model enters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq import options
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnx_intq.archive import Batch


@click.command(cls=options.Command)
@click.argument("a", type=options.FILE)
@click.argument("b", type=options.FILE)
@click.option("--data", type=options.FILE, help="Real feeds: .npz, folder or speech manifest.")
@click.option("--batches", type=click.IntRange(1), default=5, help="Of --data, the first ones.")
@options.frontend
@click.option("--worst", type=click.IntRange(1), default=10, help="Tensors to show.")
@click.option("--all", "everything", is_flag=True, help="Show all tensors, in order.")
@click.option("--plot", type=options.FILE, help="Picture of SQNR along the model's depth.")
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@options.as_json
def compare(
    a: Path,
    b: Path,
    data: Path | None,
    batches: int,
    frontend: Path | None,
    worst: int,
    everything: bool,
    plot: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare model B with model A tensor by tensor, and say where the error enters.

    Either may be float, QDQ or integer-only. Free-running, errors add up along the model;
    teacher-forced, every layer of B reads A's values, so that its error is its own.

    B may be an engine (.engine), on the GPU: then only outputs are compared, and what padding does
    to them.
    """
    from onnx_intq import compare_plot, console, graph, pictures
    from onnx_intq.compare import compare
    from onnx_intq.compare_console import show_comparison
    from onnx_intq.engine import SUFFIX

    context = click.get_current_context()
    if frontend and not data:
        raise IntqError(f"--frontend {frontend} without --data; expected both; add --data")
    if SUFFIX in {a.suffix, b.suffix}:
        why = "on engines, which hand out no inner tensors"
        options.refuse_given(context, ("worst", "everything", "plot"), why)
        _compare_engine(a, b, data, frontend, batches, threads, as_json)
        return
    if plot:
        graph.check_output(plot, a, b, data)
        pictures.require_matplotlib()
    if everything:
        options.refuse_given(context, ("worst",), "with --all, which shows every tensor")
    nets = graph.load(a), graph.load(b)
    batch = _feeds(nets, data, frontend, batches)
    with console.bar("compare") as tick:
        found = compare(*nets, batch, threads=threads, progress=tick)
    if plot:
        compare_plot.draw(plot, found, str(a), str(b))
    names = {"a": a, "b": b, "data": data, "plot": plot}
    show_comparison(
        found,
        names={key: str(path) if path else None for key, path in names.items()},
        worst=None if everything else worst,
        as_json=as_json,
    )


def _compare_engine(
    a: Path,
    b: Path,
    data: Path | None,
    frontend: Path | None,
    batches: int,
    threads: int | None,
    as_json: bool,
) -> None:
    from onnx_intq import console, engine, engine_console, engine_file, graph
    from onnx_intq.compare import random_feeds
    from onnx_intq.engine_parity import parity
    from onnx_intq.real_io import RealSession

    if a.suffix == engine.SUFFIX:
        raise IntqError(
            f"A is an engine, {a}; expected the ONNX file that B was built of; name that first, "
            "the engine second"
        )
    net = graph.load(a)
    session, _ = engine_file.load_session(b)
    shapes = {spec.name: session.profile(spec.name) for spec in session.inputs}
    if data is None:
        common = [replace(spec, shape=shapes[spec.name][1]) for spec in session.inputs]
        batch: Iterable[Batch] = [random_feeds(common)]
    else:
        batch = _feeds((net, net), data, frontend, batches)
    reference = RealSession(a, threads=threads)
    largest = {name: shape for name, (_, _, shape) in shapes.items()}
    with console.bar("compare") as tick:
        found = parity(reference, session, batch, largest=largest, progress=tick)
    engine_console.show_parity(found, model=a, engine=b, as_json=as_json)


def _feeds(
    nets: tuple[gs.Graph, gs.Graph], data: Path | None, frontend: Path | None, limit: int
) -> Iterable[Batch]:
    """The first batches of the data, else random numbers."""
    from onnx_intq import feeds
    from onnx_intq.compare import inputs, random_feeds
    from onnx_intq.source import recorded_frontend

    specs = inputs(*nets)
    if data is None:
        return [random_feeds(specs)]
    recorded = [found for found in map(recorded_frontend, nets) if found]
    given = options.read_frontend(frontend) or next(iter(recorded), None)
    return feeds.read(data, frontend=given, inputs=specs, limit=limit)
