"""What `train` prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_intq.console import SHOWN, print_json

if TYPE_CHECKING:
    from onnx_intq.training import Training


def show_training(found: Training, output: Path, as_json: bool) -> None:
    """Report what a training did."""
    if as_json:
        print_json({"output": str(output)} | as_dict(found))
        return
    progress = found.progress
    trained, held = found.samples
    left = f", {found.left_out} left out as too long" if found.left_out else ""
    click.echo(f"data       {trained} to train on, {held} held out{left}")
    click.echo(f"widths     {_widths(found)}, {100 * found.share:.1f} % of 8 bits each")
    if found.costs:
        names = found.one_bit
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        told = f"{len(names)} of {len(found.costs)} weights{shown and f': {shown}'}"
        click.echo(f"one bit    next to no loss for {told}")
    before, after = progress.history[0][1], progress.best_loss
    click.echo(
        f"held out   loss {before:.4f} before, {after:.4f} at step {progress.best_step} of "
        f"{progress.step}, never worse than before (float model {found.float_loss:.4f})"
    )
    if progress.stopped:
        click.echo(f"stopped    after {progress.step} steps: {progress.stopped}")
    click.echo(f"seconds    {found.seconds:.1f}")
    click.echo(f"wrote      {output}")


def as_dict(found: Training) -> dict[str, object]:
    """For JSON."""
    progress = found.progress
    return {
        "before": progress.history[0][1],
        "after": progress.best_loss,
        "float": found.float_loss,
        "best_step": progress.best_step,
        "steps": progress.step,
        "stopped": progress.stopped,
        "history": progress.history,
        "bits": found.bits,
        "share": found.share,
        "one_bit": found.one_bit,
        "costs": {key: curve.tolist() for key, curve in found.costs.items()},
        "samples": found.samples[0],
        "held_out": found.samples[1],
        "left_out": found.left_out,
        "seconds": found.seconds,
    }


def _widths(found: Training) -> str:
    counts = Counter(found.bits.values())
    return ", ".join(
        f"{_number(count, 'weight')} of {_number(bits, 'bit')}"
        for bits, count in sorted(counts.items())
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
