"""Calls a module in a child process: a crash of a foreign library ends the child, not us.

Request and answer are JSON files in a folder that both share, so that nothing the library prints
is mistaken for an answer. No shell, no pickle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx_intq.transform import IntqError

REQUEST, ANSWER = "request.json", "answer.json"


class ChildError(IntqError):
    """The child crashed, failed or took too long; the message says which, and nothing else."""


def ask(module: str, request: Mapping[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Run `python -m module folder`, which calls `serve`, and return its answer.

    Args:
        module: The module's name.
        request: What `serve` hands to its function; JSON.
        folder: An empty one; the child may leave further files in it.
        timeout: Seconds after which the child is killed.

    Raises:
        ChildError: The child did not come to an answer.
        IntqError: The child raised one.
    """
    (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
    failure = _run(module, folder, timeout)
    if failure or not (folder / ANSWER).is_file():
        raise ChildError(failure or "ended without an answer")
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    if "error" in answer:
        raise IntqError(answer["error"])
    return answer


def serve(folder: Path, function: Callable[[Mapping[str, Any], Path], dict[str, Any]]) -> None:
    """In the child: answer the request in `folder` by `function(request, folder)`.

    An IntqError is handed on; any other error ends the child.
    """
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        answer = function(request, folder)
    except IntqError as error:
        answer = {"error": str(error)}
    (folder / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _run(module: str, folder: Path, timeout: float) -> str:
    """Run the child; return how it failed, "" if it did not."""
    # The child must find what this process finds, and nothing in the current folder besides (-P).
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout:g} s"
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"failed ({lines[-1] if lines else done.returncode})" if done.returncode else ""
