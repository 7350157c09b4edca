"""`onnx-intq train`: fine-tune a model to weights of few bits."""

from __future__ import annotations

import math
from pathlib import Path

import click

from onnx_intq import options

METHODS = click.Choice(["gq", "s8bqat", "uniform", "none"])


@click.command(cls=options.Command)
@options.model
@options.output
@click.option("--manifest", type=options.FILE, help="Speech, one JSON object per line.")
@click.option("--data", type=options.FILE, help="Feeds (.npz), as `synthesize` makes them.")
@click.option(
    "--method",
    type=METHODS,
    default="gq",
    help="gq: centroids that learn; s8bqat: fixed centroids and a regularizer; uniform: learnt "
    "scales; none: uniform weights without any training.",
)
@click.option("--bits", type=click.IntRange(1, 8), default=5, help="Of the weights.")
@click.option("--override", multiple=True, metavar="NODES=BITS", help="By name.")
@click.option(
    "--budget",
    type=click.FloatRange(0.125, 1),
    metavar="SHARE",
    help="Of 8 bits per weight, in place of --bits: widths 1..8 are chosen for each weight.",
)
@click.option("--steps", type=click.IntRange(1), default=400, help="Batches to train on.")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Utterances.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    callback=options.finite,
    help="Learning rate.",
)
@click.option(
    "--task",
    type=click.FloatRange(0),
    default=1.0,
    callback=options.finite,
    help="Factor of the loss on transcripts; 0 if there are none.",
)
@click.option(
    "--distill",
    type=click.FloatRange(0),
    default=1.0,
    callback=options.finite,
    help="Factor of the divergence from the float model.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=17.0,
    callback=options.finite,
    help="Longest utterance; longer ones are left out, with --task 0 cropped.",
)
@click.option(
    "--quantize-every", type=click.IntRange(1), default=1, help="Steps between two quantizations."
)
@click.option(
    "--validate-every", type=click.IntRange(1), default=25, help="Steps between two validations."
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9, min_open=True),
    default=0.1,
    callback=options.finite,
    help="Share of the data to validate on; at least one sample.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    callback=options.finite,
    help="Then stop, and write the best so far.",
)
@click.option("--checkpoint", type=options.FILE, help="File to write at every validation.")
@click.option("--resume", type=options.FILE, help="Checkpoint to go on from.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Results depend on it.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Of products in training steps; bfloat16 is faster where the processor has it.",
)
@options.seed
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Of torch.")
@options.frontend
@click.option(
    "--labels", type=options.FILE, help="JSON list of labels, for models that record none."
)
@options.as_json
def train(
    model: Path,
    output: Path,
    manifest: Path | None,
    data: Path | None,
    method: str,
    bits: int,
    override: tuple[str, ...],
    budget: float | None,
    steps: int,
    batch_size: int,
    rate: float,
    task: float,
    distill: float,
    seconds: float,
    quantize_every: int,
    validate_every: int,
    held_out: float,
    minutes: float | None,
    checkpoint: Path | None,
    resume: Path | None,
    threads: int,
    precision: str,
    seed: int,
    device: str,
    frontend: Path | None,
    labels: Path | None,
    as_json: bool,
) -> None:
    """Fine-tune a float ONNX file, or the folder of an RNN-T, to weights of few bits.

    Losses: CTC or the RNN-T's on a manifest, and the divergence from the float model; on feeds
    the latter alone. What is written is the best on held-out data, also after Ctrl-C. Under
    torchrun, processes share every batch.
    """
    import torch

    from onnx_intq import console, speech, training_console
    from onnx_intq.training import Run, train
    from onnx_intq.training_plan import Plan
    from onnx_intq.training_source import TrainingSource

    context = click.get_current_context()
    if data is not None:
        why = "without --manifest"
        options.refuse_given(context, ("task", "seconds", "labels", "frontend"), why)
    if budget is not None:
        options.refuse_given(context, ("bits",), "beside --budget, which chooses the widths")
    if method == "none":
        trained = ("steps", "rate", "quantize_every", "validate_every", "minutes", "checkpoint")
        why = "with --method none, without any training"
        options.refuse_given(context, (*trained, "resume"), why)
    torch.set_num_threads(threads)
    plan = Plan(
        method=method,
        bits=bits,
        overrides=options.split_overrides(override, smallest=1, words=()).bits,
        budget=budget,
        steps=steps,
        batch_size=batch_size,
        rate=rate,
        task=task if data is None else 0.0,
        distill=distill,
        seconds=seconds,
        quantize_every=quantize_every,
        validate_every=validate_every,
        held_out=held_out,
        seed=seed,
        bfloat16=precision == "bfloat16",
    )
    source = TrainingSource(
        manifest=manifest,
        data=data,
        frontend=options.read_frontend(frontend),
        labels=speech.read_labels(labels) if labels else None,
    )
    run = Run(
        device=device,
        minutes=math.inf if minutes is None else minutes,
        checkpoint=checkpoint,
        resume=resume,
    )
    found = train(model, output, source, plan, run, bar=console.bar)
    if found is not None:
        training_console.show_training(found, output, as_json)
