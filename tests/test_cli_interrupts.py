"""Ctrl-C: exit code 130, one line, and every file as it was before."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(folder: Path, line: str) -> tuple[int, str]:
    """Press Ctrl-C once the progress bar of the command shows; return exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "onnx_intq.cli", *line.split()],
        cwd=folder,
        # A terminal to draw on, and Ctrl-C as a shell leaves it, whatever started these tests.
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    seen, deadline = b"", time.monotonic() + 120
    while b"/" not in seen and time.monotonic() < deadline:  # as in "3/2000"
        if select.select([process.stderr], [], [], 1)[0]:
            seen += os.read(process.stderr.fileno(), 4096)
        if process.poll() is not None:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    return process.returncode, (seen + rest).decode()


def test_an_interrupt_is_told_in_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_intq.registry.load", interrupt)
    code, out, err = command("passes", "fold_bn")
    assert (code, out) == (130, "")
    assert err.strip() == "error: interrupted; no file was left half written"


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "synthesize m.onnx -o o.npz --batches 9 --frames 2000 --method qasr",
        "quantize m.onnx -o o.onnx --method qasr",
    ],
)
def test_an_interrupt_leaves_no_half_files(tiny: Path, line: str) -> None:
    before = contents(tiny.parent)
    code, err = interrupt(tiny.parent, line)
    assert contents(tiny.parent) == before
    assert code == 130
    assert "synthesize" in err  # it was under way
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", err)
    told = [text for text in plain.splitlines() if "error" in text or "Traceback" in text]
    assert told == ["error: interrupted; no file was left half written"]
    assert plain.endswith(told[0] + "\n")
