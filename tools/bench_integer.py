"""The table `integer` of bench.py: how equal a Q/DQ file and its integer-only form are."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

from onnx_intq import feeds, graph, shapes
from onnx_intq.compare import compare, inputs
from onnx_intq.console import table
from onnx_intq.evaluate import evaluate
from onnx_intq.feeds import Batch
from onnx_intq.integer_only import examine
from onnx_intq.interpreter import Interpreter, SideBySide
from onnx_intq.source import recorded_frontend
from onnx_intq.verify import random_feeds

UTTERANCES = 5


def print_tables(qdq: Path, integer: Path, manifest: Path) -> None:
    """Print what both files share and where the integer one spends its time."""
    a, b = graph.load(qdq), graph.load(integer)
    frontend = recorded_frontend(a)
    batches = list(islice(feeds.read(manifest, frontend=frontend, inputs=inputs(a, b)), UTTERANCES))
    found = compare(a, b, batches)
    forced = found.differing_per_million(lambda row: row.forced)
    free = found.differing_per_million(lambda row: row.free)
    words = evaluate(integer, manifest, against=qdq).total
    proof = examine(graph.read_model(integer))
    sides = SideBySide(b)
    differing = sum(len(sides.run(batch)) for batch in batches)
    size = integer.stat().st_size / qdq.stat().st_size
    rows = [
        ("places that are not integer", len(proof.findings)),
        ("integers that differ from the Q/DQ file's, teacher-forced, per million", f"{forced:.3g}"),
        ("integers that differ, free-running, per million", f"{free:.3g}"),
        (f"words of {words.words} that differ from the Q/DQ file's, %", f"{words.differs:.2f}"),
        (f"tensors of {len(Interpreter(b).tensors)} that differ from the interpreter's", differing),
        ("file size, times the Q/DQ file's", f"{size:.3f}"),
    ]
    table(f"integer-only against Q/DQ, {UTTERANCES} utterances", ("what", "found"), rows)
    _print_profile(integer, random_feeds(b, shapes.input_shapes(b, seconds=10)))


def _print_profile(model: Path, batch: Batch) -> None:
    """Time per operator, as onnxruntime's profiler counts it, one thread."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(4):
            session.run(None, batch)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    rows = [(op, f"{100 * time / total:.1f}") for op, time in spent.most_common(7)]
    table("where the integer-only model spends its time", ("operator", "%"), rows)
