"""The command line: `onnx-intq COMMAND`. Thin: options in, one call of the library, a report out.

Heavy libraries are imported inside the commands, so that `--help` answers at once. Exit codes:
0 done, 1 a check failed, 2 wrong use or bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from onnx_intq import __version__, options
from onnx_intq.transform import CheckFailed, IntqError

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
}


def main() -> None:
    """Run a command; every error a user can cause is one line on stderr."""
    # Read when torch is loaded. Threads that wait actively make a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli.main(prog_name="onnx-intq", standalone_mode=False)
    except click.Abort:
        sys.exit(_complain("interrupted; no file was left half written", 130))
    except CheckFailed as error:
        sys.exit(_complain(str(error), 1))
    except click.ClickException as error:
        sys.exit(_complain(f"{error.format_message()} Try onnx-intq --help.", 2))
    except IntqError as error:
        sys.exit(_complain(str(error), 2))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_complain("out of memory; give fewer or shorter batches", 2))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so in words alone."""
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


def _complain(message: str, code: int) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return code


@click.group(cls=options.Group, context_settings=CONTEXT, no_args_is_help=False)
@click.version_option(__version__, prog_name="onnx-intq")
def cli() -> None:
    """Quantize ONNX speech models to INT8 without any data."""


@cli.command()
@click.argument("source", metavar="NAME|FILE.nemo")
@options.output
@click.option("--weights", type=options.FILE, help="PyTorch state dict to load into a zoo model.")
@click.option("--opset", default=17, help="ONNX opset to write.")
@click.option("--lengths", is_flag=True, help="Add the length input and the masks it needs.")
def export(source: str, output: Path, weights: Path | None, opset: int, lengths: bool) -> None:
    """Write a model of the zoo, or a NeMo checkpoint, as float ONNX with BatchNorm kept."""
    from onnx_intq.models.export import export_named

    export_named(source, output, weights=weights, opset=opset, lengths=lengths)
    click.echo(f"wrote {output}", err=True)


@cli.command()
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


@cli.command()
@options.model
@options.output
@click.option("--data", type=options.FILE, required=True, help=".npz, folder or speech manifest.")
@options.observer
@options.frontend
def calibrate(
    model: Path, output: Path, data: Path, observer: str | None, frontend: Path | None
) -> None:
    """Record the range of every activation, by all observers, as JSON."""
    from onnx_intq import console, graph
    from onnx_intq.calibrate import calibrate
    from onnx_intq.quantize import prepared
    from onnx_intq.source import Source

    graph.check_output(output, model, data)
    net = prepared(model)
    source = Source(data=data, frontend=options.read_frontend(frontend))
    with console.bar("calibrate") as tick:
        chosen = observer or options.OBSERVER
        found = calibrate(net, source.real(net), observer=chosen, progress=tick)
    found.write(output)
    click.echo(f"wrote ranges of {len(found.tensors)} tensors to {output}", err=True)


@cli.command()
@options.model
@options.output
@click.option("--target", type=options.TARGETS, default="ort", help="What will run it.")
@click.option("--data", type=options.FILE, help="Real feeds in place of synthetic ones.")
@click.option("--ranges", type=options.FILE, help="Ranges from `calibrate` in place of any data.")
@options.method
@click.option("-w", "--weights", type=click.IntRange(2, 8), default=8, help="Bits of weights.")
@click.option(
    "-a", "--activations", type=click.Choice(["8", "16"]), default="8", help="Bits of activations."
)
@click.option(
    "--weight-scale",
    type=click.Choice(["mse", "minmax"]),
    default="mse",
    help="mse: least error per channel; minmax: no weight clipped.",
)
@options.observer
@click.option("--override", multiple=True, metavar="NODES=BITS|a16|float", help="By name.")
@click.option("--recipe", help="The whole pipeline, or @FILE, in place of the target's.")
@options.allow_bn
@options.verify
@options.seed
@options.device
@options.frontend
@options.as_json
def quantize(
    model: Path,
    output: Path,
    target: str,
    data: Path | None,
    ranges: Path | None,
    method: str,
    weights: int,
    activations: str,
    weight_scale: str,
    observer: str | None,
    override: tuple[str, ...],
    recipe: str | None,
    allow_bn: bool,
    verify: bool,
    seed: int,
    device: str,
    frontend: Path | None,
    as_json: bool,
) -> None:
    """Turn a float ONNX file into an INT8 one; without --data or --ranges, from the file alone."""
    from onnx_intq import console, recipes
    from onnx_intq.quantize import quantize
    from onnx_intq.source import Source

    context = click.get_current_context()
    if recipe is not None:
        pipeline = ("target", "weights", "activations", "weight_scale", "override")
        options.refuse_given(context, pipeline, "beside --recipe, which is the whole pipeline")
    if data is not None or ranges is not None:
        options.refuse_given(context, ("method", "device"), "beside --data or --ranges")
    chosen = options.split_overrides(override)
    passes = recipes.pipeline(
        target,
        weight_bits=weights,
        activation_bits=int(activations),
        weight_scale=weight_scale,
        keep=chosen.keep,
        wide=chosen.wide,
        overrides=chosen.bits,
    )
    summary = quantize(
        model,
        output,
        passes if recipe is None else options.read_recipe(recipe),
        Source(
            ranges=ranges,
            data=data,
            method=method,
            seed=seed,
            device=device,
            frontend=options.read_frontend(frontend),
        ),
        observer=observer,
        allow_bn=allow_bn,
        verify=verify,
        bar=console.bar,
    )
    console.show_quantization(summary, output, as_json)


@cli.command()
@click.argument("recipe", metavar="'PASS, PASS(option=value)'|@FILE")
@options.model
@click.option("-o", "--output", type=options.FILE, help="File to write; not needed with --dry-run.")
@click.option("--ranges", type=options.FILE, help="Ranges from `calibrate`.")
@options.observer
@click.option("--dry-run", is_flag=True, help="Only say what each pass would change.")
@options.allow_bn
@options.verify
@options.as_json
def run(
    recipe: str,
    model: Path,
    output: Path | None,
    ranges: Path | None,
    observer: str | None,
    dry_run: bool,
    allow_bn: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Run any pipeline of passes, ONNX in, ONNX out."""
    from onnx_intq import console
    from onnx_intq.quantize import run_recipe

    if output is None and not dry_run:
        raise IntqError("no output file; expected -o FILE; give one, or --dry-run")
    reports, drifts = run_recipe(
        model,
        None if dry_run else output,
        options.read_recipe(recipe),
        ranges,
        observer=observer,
        allow_bn=allow_bn,
        verify=verify,
    )
    console.show_reports(reports, drifts, as_json)
    if not dry_run and not as_json:
        click.echo(f"wrote {output}")


@cli.command()
@click.argument("name", required=False)
@options.as_json
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options, what it needs and what it gives."""
    from onnx_intq import console, registry

    found = [registry.load(each) for each in ([name] if name else registry.names())]
    console.show_passes(found, name is not None, as_json)


@cli.command()
@options.model
@click.option("--target", type=options.TARGETS, required=True, help="Whose rules to check.")
@options.as_json
def check(model: Path, target: str, as_json: bool) -> None:
    """Say what its target would reject or not run on integers; exit 1 if there is anything."""
    from onnx_intq import console, graph
    from onnx_intq.check import check

    console.show_problems(check(graph.load(model), target), target, as_json)


@cli.command()
@options.model
@click.option(
    "--manifest", type=options.FILE, required=True, help="Speech, one JSON object per line."
)
@click.option("--against", type=options.FILE, help="The float model, for `differs`.")
@options.frontend
@click.option(
    "--labels", type=options.FILE, help="JSON list of labels, for models that record none."
)
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Utterances.")
@options.as_json
def evaluate(
    model: Path,
    manifest: Path,
    against: Path | None,
    frontend: Path | None,
    labels: Path | None,
    threads: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Word error rate of a CTC model, and how often its words differ from the float model's."""
    from onnx_intq import console, speech
    from onnx_intq.evaluate import evaluate

    with console.bar("evaluate") as tick:
        found = evaluate(
            model,
            manifest,
            against=against,
            frontend=options.read_frontend(frontend),
            labels=speech.read_labels(labels) if labels else None,
            threads=threads,
            batch_size=batch_size,
            progress=tick,
        )
    console.show_evaluation(found, as_json)


@cli.command()
@options.model
@click.option("--seconds", default=10.0, help="Of audio.")
@options.as_json
def cost(model: Path, seconds: float, as_json: bool) -> None:
    """Parameters, bytes, multiplications (MACs) and bit operations (BOPs)."""
    from onnx_intq import console, graph
    from onnx_intq.cost import cost

    console.show_cost(cost(graph.load(model), seconds=seconds), seconds, as_json)


@cli.command()
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


if __name__ == "__main__":
    main()
