"""Pretends that torch has a GPU, and that TensorRT is installed: `library/tensorrt.py`."""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from onnx_intq import engine_device

NAME = "NVIDIA Fake T4"
SLEEP = 0.001


class Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self, stream: Stream) -> None:
        assert stream.cuda_stream == Stream.cuda_stream
        time.sleep(SLEEP)
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@contextmanager
def context(*_: object, **__: object) -> Iterator[None]:
    yield


def pretend(patch: pytest.MonkeyPatch) -> ModuleType:
    """Do so until the end of a test; the module that stands for TensorRT."""
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda: (7, 5),
        "get_device_name": lambda: NAME,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": context,
        "stream": context,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(engine_device, "CUDA", "cpu")
    patch.syspath_prepend(str(Path(__file__).parent / "library"))
    patch.setitem(sys.modules, "tensorrt", None)  # to be what it was when the test ends
    del sys.modules["tensorrt"]
    return importlib.import_module("tensorrt")
