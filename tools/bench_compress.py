"""File size, resident memory and latency of models, packed and not, in onnxruntime on the CPU.

    python tools/bench_compress.py [--seconds 10] NAME=FILE.onnx|FOLDER ...

The first is the one that others are compared with. A folder is an RNN-T: its three sessions are
loaded together, and what is timed is its encoder. Each model has a fresh process for its memory,
where what Python and onnxruntime take before is not counted, and is run three ways:

    folded      as onnxruntime does it by itself: packed weights are decoded while it loads
    each run    without its constant folding: packed weights stay so, and are decoded in each run
    float       DequantizeLinear of constants is folded, too: weights are float32 in memory

While it folds, onnxruntime holds every intermediate result; what it frees stays with the process as
long as the C library keeps it. "held" is what is left when that has been given back (malloc_trim).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from onnx_intq.graph import file_bytes, load
from onnx_intq.transducer_folder import is_folder, part_paths
from onnx_intq.verify import small_feeds

WAYS = ("folded", "each run", "float")
FRAMES = 100
"""Per second of audio."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model run one way.

    Attributes:
        model: Its name.
        way: Of `WAYS`.
        file: Bytes on disk.
        loaded: Bytes that loading has added to the process.
        held: The same without what is free.
        run: As `loaded`, after the first run.
        peak: The most there was.
        milliseconds: Median latency.
    """

    model: str
    way: str
    file: int
    loaded: int
    held: int
    run: int
    peak: int
    milliseconds: float


def measured(name: str, path: Path, way: str, seconds: float, rounds: int) -> Row:
    """Measure in a process of its own."""
    request = {"path": str(path), "way": way, "seconds": seconds, "rounds": rounds}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    files = part_paths(path).values() if is_folder(path) else [path]
    return Row(model=name, way=way, file=sum(map(file_bytes, files)), **json.loads(done.stdout))


def child(request: Mapping[str, Any]) -> dict[str, float]:
    """Load and run one model; what it adds to this process, and how long a run takes."""
    import onnxruntime as ort

    path = Path(request["path"])
    files = list(part_paths(path).values()) if is_folder(path) else [path]
    frames = round(request["seconds"] * FRAMES)
    feeds = small_feeds(load(files[0]), frames=frames)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if request["way"] == "float":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    left_out = ["ConstantFolding"] if request["way"] == "each run" else []
    _give_back()
    before = _status("VmRSS")
    sessions = [
        ort.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
        )
        for file in files
    ]
    loaded = _status("VmRSS") - before
    _give_back()
    held = _status("VmRSS") - before
    sessions[0].run(None, feeds)
    run, peak = _status("VmRSS") - before, _status("VmHWM") - before
    times = []
    for _ in range(request["rounds"]):
        start = time.perf_counter()
        sessions[0].run(None, feeds)
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)
    return {"loaded": loaded, "held": held, "run": run, "peak": peak, "milliseconds": milliseconds}


def _give_back() -> None:
    """Free what nobody refers to, to the operating system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    """Bytes of this process, from Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; file sizes beside the first row's."""
    lines = [
        "| model | way | file MB | | loaded MB | held MB | after a run MB | peak MB | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        change = f"{100 * (row.file / rows[0].file - 1):+.1f} %"
        sizes = [f"{size / 1e6:.1f}" for size in (row.loaded, row.held, row.run, row.peak)]
        cells = (row.model, row.way, f"{row.file / 1e6:.3f}", change, *sizes)
        lines.append(f"| {' | '.join(cells)} | {row.milliseconds:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME=FILE")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        click.echo(json.dumps(child(json.loads(given.child))))
        return
    pairs = [text.partition("=") for text in given.models]
    rows = [
        measured(name, Path(path), way, given.seconds, given.rounds)
        for name, _, path in pairs
        for way in WAYS
    ]
    click.echo(json.dumps([asdict(row) for row in rows]) if given.json else markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
