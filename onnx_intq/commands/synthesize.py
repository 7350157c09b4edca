"""`onnx-intq synthesize`: make calibration data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from onnx_intq import options
from onnx_intq.transform import IntqError


@click.command(cls=options.Command)
@options.model
@options.output
@options.method
@click.option("--batches", type=click.IntRange(1), help="Independent batches.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples in a batch.")
@click.option("--frames", type=click.IntRange(1), help="Frames in a sample.")
@click.option("--steps", type=click.IntRange(0), help="Steps of Adam per batch, at most.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    callback=options.finite,
    help="Adam's learning rate.",
)
@options.seed
@options.device
@click.option(
    "--plot", type=options.FILE, help="Picture of real, random and synthetic input, with text."
)
@click.option(
    "--real", type=options.FILE, help="Speech manifest whose first utterance --plot shows."
)
@options.as_json
def synthesize(
    model: Path,
    output: Path,
    method: str,
    batches: int | None,
    batch_size: int | None,
    frames: int | None,
    steps: int | None,
    lr: float | None,
    seed: int,
    device: str,
    plot: Path | None,
    real: Path | None,
    as_json: bool,
) -> None:
    """Make calibration data (.npz feeds) from the ONNX file alone."""
    from onnx_intq import console, feeds, graph, spectrograms
    from onnx_intq.synthesize import RECIPES, synthesize

    graph.check_output(output, model, real)
    if plot:
        graph.check_output(plot, model, real)
        if plot.resolve() == output.resolve():
            raise IntqError(f"{plot}: is also the output; expected another name; change --plot")
        spectrograms.check(model, real)
    elif real:
        raise IntqError(f"--real {real} without --plot; expected both; add --plot FILE.png")
    if method == "random":
        context = click.get_current_context()
        options.refuse_given(context, ("steps", "lr"), "with --method random, which takes no steps")
    preset = RECIPES[method]
    recipe = replace(
        preset,
        batches=batches or preset.batches,
        batch_size=batch_size or preset.batch_size,
        frames=frames or preset.frames,
        steps=preset.steps if steps is None else steps,
        lr=lr or preset.lr,
        seed=seed,
    )
    net = graph.load(model)
    with console.bar("synthesize") as tick:
        results = list(synthesize(net, recipe, device=device, progress=tick))
    feeds.write(output, [result.batch for result in results])
    if plot:
        spectrograms.draw(plot, model, results[0].batch, real)
    console.show_synthesis(results, output, plot, as_json)
