"""`onnx-intq bench`: measure how fast models run."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.transform import IntqError


@click.command(cls=options.Command)
@click.argument("models", nargs=-1, required=True, type=options.FILE)
@options.seconds
@click.option("--rounds", type=click.IntRange(1), default=20, help="Timed runs.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Per operator.")
@click.option(
    "--batch-size",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    help="Utterances per run of an engine; may be given again.",
)
@click.option("--cuda-graph", is_flag=True, help="Replay CUDA graphs of engines.")
@options.as_json
def bench(
    models: tuple[Path, ...],
    seconds: float,
    rounds: int,
    threads: int,
    batches: tuple[int, ...],
    cuda_graph: bool,
    as_json: bool,
) -> None:
    """Latency of models, run in turn, as ratios to the first.

    ONNX files run on onnxruntime's CPU, engines (.engine) on the GPU, timed by its own clock.
    """
    from onnx_intq.engine import SUFFIX

    context = click.get_current_context()
    engines = [model for model in models if model.suffix == SUFFIX]
    if engines and len(engines) < len(models):
        other = next(model for model in models if model not in engines)
        raise IntqError(
            f"{engines[0]} runs on the GPU, {other} on the CPU; expected files of one kind; "
            "measure them apart"
        )
    if engines:
        options.refuse_given(context, ("threads",), "on engines, which run on the GPU")
        _bench_engines(engines, seconds, rounds, batches, cuda_graph, as_json)
        return
    options.refuse_given(context, ("batches", "cuda_graph"), "on ONNX files, but on engines")
    from onnx_intq import console, graph, runtime, shapes
    from onnx_intq.verify import random_feeds

    nets = [graph.load(model) for model in models]
    feeds = [random_feeds(net, shapes.input_shapes(net, seconds=seconds)) for net in nets]
    timings = runtime.latency(list(models), feeds, rounds=rounds, threads=threads)
    console.show_timings(models, timings, seconds, as_json)


def _bench_engines(
    files: list[Path],
    seconds: float,
    rounds: int,
    batches: tuple[int, ...],
    cuda_graph: bool,
    as_json: bool,
) -> None:
    from onnx_intq import engine_bench, engine_console, engine_device

    gpu = engine_device.require_gpu(f"{files[0]}: running an engine")
    rows = engine_bench.latency(
        files, seconds=seconds, batches=batches, rounds=rounds, graph=cuda_graph
    )
    engine_console.show_timings(rows, seconds, gpu.name, as_json)
