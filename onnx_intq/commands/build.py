"""`onnx-intq build`: have TensorRT build an engine."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
@options.model
@options.output
@click.option(
    "--shapes",
    multiple=True,
    metavar="INPUT=SHAPE[:SHAPE:SHAPE]",
    help="Smallest, most common and largest, such as 1x64x200:1x64x1000:8x64x2000. "
    "Default: batch 1 to 8, 2 to 20 seconds of audio.",
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Default: tensorrt where it is installed and has a GPU, else tensorrt-rtx.",
)
@click.option(
    "--compute-capability",
    metavar="X.Y",
    help="The kind of GPU, such as 7.5. Default: that of the GPU at hand, else 8.6.",
)
@click.option("--workspace", type=click.IntRange(1), help="MiB of GPU memory a layer may use.")
@click.option(
    "--timing-cache",
    type=options.FILE,
    help="Kernel times: taken from the file if it exists, so that a build can be repeated.",
)
@click.option("--timing-cache-sha256", metavar="HEX", help="Refuse any other timing cache.")
@click.option("--force", is_flag=True, help="Build even where the engine still fits.")
@options.as_json
def build(
    model: Path,
    output: Path,
    shapes: tuple[str, ...],
    backend: str | None,
    compute_capability: str | None,
    workspace: int | None,
    timing_cache: Path | None,
    timing_cache_sha256: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build an engine, strongly typed, with a sidecar E.engine.json that says what it is."""
    from onnx_intq import console, engine, engine_console, engine_file
    from onnx_intq.engine_profile import read_shapes

    request = engine_file.Request(
        model=model,
        target=engine.choose(backend, compute_capability),
        shapes=read_shapes(shapes),
        workspace=workspace,
        timing_cache=timing_cache,
        timing_cache_sha256=timing_cache_sha256,
    )
    with console.bar("build"):
        sidecar, reused = engine_file.build_file(request, output, force=force)
    note = request.target.note
    engine_console.show_build(sidecar, output, reused=reused, note=note, as_json=as_json)
