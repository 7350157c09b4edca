"""`onnx-intq evaluate`: measure word error rates."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_intq import options


@click.command(cls=options.Command)
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
@click.option("--beam", type=click.IntRange(1), help="Width, of RNN-Ts. Default: greedy search.")
@click.option("--chunk", type=click.IntRange(1), help="Frames an RNN-T gets at once. Default: all.")
@options.as_json
def evaluate(
    model: Path,
    manifest: Path,
    against: Path | None,
    frontend: Path | None,
    labels: Path | None,
    threads: int | None,
    batch_size: int,
    beam: int | None,
    chunk: int | None,
    as_json: bool,
) -> None:
    """Word error rate of a model, and how often its words differ from the float model's.

    A folder is an RNN-T: encoder.onnx, predictor.onnx and joint.onnx. Engines (.engine) run on the
    GPU; their sidecars say the front end and the labels.
    """
    from onnx_intq import console, speech
    from onnx_intq.engine import SUFFIX
    from onnx_intq.evaluate import evaluate

    if {path.suffix for path in (model, against) if path} == {SUFFIX}:
        why = "on engines, which run on the GPU"
        options.refuse_given(click.get_current_context(), ("threads",), why)
    with console.bar("evaluate") as tick:
        found = evaluate(
            model,
            manifest,
            against=against,
            frontend=options.read_frontend(frontend),
            labels=speech.read_labels(labels) if labels else None,
            threads=threads,
            batch_size=batch_size,
            beam=beam,
            chunk=chunk,
            progress=tick,
        )
    console.show_evaluation(found, as_json)
