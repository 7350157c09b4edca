"""Time and memory of quantizing: whole processes, ours and onnxruntime's, and the passes alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from onnx_intq import feeds, graph, registry
from onnx_intq.console import table
from onnx_intq.quantize import known_facts
from onnx_intq.recipes import PREPARE
from onnx_intq.transform import Context, run

SWEEP_BATCHES, PEER_BATCHES = 20, 4
"""Batches of 8 x 64 x 500 frames; the peer keeps all activations in memory, so it gets fewer."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of a finished child process: seconds and bytes."""

    wall: float
    cpu: float
    peak: int


def print_tables(source: Path, many: Path, few: Path, work: Path, peer: Sequence[object]) -> None:
    """Quantizing, one calibration sweep, and the passes alone.

    Args:
        source: The float model.
        many: `SWEEP_BATCHES` batches.
        few: `PEER_BATCHES` batches.
        work: Folder for what is written.
        peer: The command that calibrates by onnxruntime on `few`.
    """
    ours = [sys.executable, "-m", "onnx_intq.cli"]
    calibrate = [*ours, "calibrate", source, "-o", work / "timed.json", "--data"]
    sweep = "batches, all observers"
    calls: Mapping[str, Sequence[object]] = {
        "quantize, zero-shot, all defaults": [*ours, "quantize", source, "-o", work / "timed.onnx"],
        f"our sweep, {SWEEP_BATCHES} {sweep}": [*calibrate, many],
        f"our sweep, {PEER_BATCHES} {sweep}": [*calibrate, few],
        f"onnxruntime, {PEER_BATCHES} batches, percentile alone": peer,
    }
    rows = [_row(name, measure(call)) for name, call in calls.items()]
    table("whole processes", ("work", "wall s", "CPU s", "peak GB"), rows)
    _time_passes(source)


def write_random(path: Path, batches: int) -> None:
    """Write batches of normal random features, float32."""
    rng = np.random.default_rng(0)
    shape = (8, 64, 500)
    feeds.write(
        path,
        ({"audio_signal": rng.standard_normal(shape).astype(np.float32)} for _ in range(batches)),
    )


def measure(command: Sequence[object]) -> Usage:
    """Run a command to its end.

    Raises:
        click.ClickException: It failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise click.ClickException(f"failed: {' '.join(map(str, command))}")
    cpu = used.ru_utime + used.ru_stime
    return Usage(wall=time.perf_counter() - start, cpu=cpu, peak=used.ru_maxrss * 1024)


def _row(name: str, usage: Usage) -> tuple[str, str, str, str]:
    return (name, f"{usage.wall:.0f}", f"{usage.cpu:.0f}", f"{usage.peak / 1e9:.2f}")


def _time_passes(source: Path) -> None:
    """Print the seconds that the passes of plain INT8 take."""
    start = time.perf_counter()
    net = graph.load(source)
    ranges = dict.fromkeys((t.name for n in net.nodes for t in n.outputs), (-1.0, 1.0))
    context = Context(
        facts=known_facts(net) | {"calibrated"},
        ranges=ranges | {t.name: (-1.0, 1.0) for t in net.inputs},
    )
    loaded = time.perf_counter()
    run(net, registry.parse(f"{PREPARE}, insert_qdq, quantize_weights"), context)
    done = time.perf_counter()
    click.echo(f"load {loaded - start:.1f} s, passes alone {done - loaded:.1f} s")
