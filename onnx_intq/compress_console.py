"""What `compress` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from onnx_intq.compress import MODEL, Compression
from onnx_intq.console import print_json, show_skipped


def show_compression(done: Mapping[str, Compression], output: Path, as_json: bool) -> None:
    """Report what was done, of a folder part by part and in sum."""
    before = sum(each.bytes_before for each in done.values())
    after = sum(each.bytes_after for each in done.values())
    if as_json:
        found: dict[str, object] = {"output": str(output)}
        if MODEL in done:
            found |= done[MODEL].to_dict()
        else:
            parts = {part: each.to_dict() for part, each in done.items()}
            found |= {"bytes_before": before, "bytes_after": after, "parts": parts}
        print_json(found)
        return
    for part, each in done.items():
        if part != MODEL:
            click.echo(part)
        _show(each)
    if MODEL not in done:
        click.echo(f"all parts  {_sizes(before, after)}")
    click.echo(f"wrote      {output}")


def _show(done: Compression) -> None:
    if done.coded:
        click.echo(f"coded      {done.coded} weights")
    counts = ", ".join(f"{count} of {bits} bits" for bits, count in done.packed.items())
    click.echo(f"packed     {sum(done.packed.values())} constants{counts and f': {counts}'}")
    show_skipped(done.left)
    click.echo(f"size       {_sizes(done.bytes_before, done.bytes_after)}")
    drift = done.drift
    click.echo(f"drift      SQNR {drift.sqnr:.1f} dB, largest {drift.largest:.3g}, on random input")
    click.echo(f"recipe     {done.recipe}")


def _sizes(before: int, after: int) -> str:
    return f"{before / 1e6:.3f} MB -> {after / 1e6:.3f} MB ({before / after:.2f} to 1)"
