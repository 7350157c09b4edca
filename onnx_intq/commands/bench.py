"""`onnx-intq bench`: measure how fast models run."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
@click.argument("models", nargs=-1, required=True, type=options.FILE)
@click.option("--seconds", default=10.0, help="Of audio in the input.")
@click.option("--rounds", type=click.IntRange(1), default=20, help="Timed runs.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Per operator.")
@options.as_json
def bench(
    models: tuple[Path, ...], seconds: float, rounds: int, threads: int, as_json: bool
) -> None:
    """Latency of models on onnxruntime's CPU, run in turn, as ratios to the first."""
    from onnx_intq import console, graph, runtime, shapes
    from onnx_intq.verify import random_feeds

    nets = [graph.load(model) for model in models]
    feeds = [random_feeds(net, shapes.input_shapes(net, seconds=seconds)) for net in nets]
    timings = runtime.latency(list(models), feeds, rounds=rounds, threads=threads)
    console.show_timings(models, timings, seconds, as_json)
