"""TensorRT's Python module, typed: the names that are taken from it. `engine.py` imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from onnx_intq import engine_api as api


class Library(Protocol):
    """`tensorrt`, or what it has in common with `tensorrt_rtx`."""

    __version__: str
    Builder: Callable[[api.ILogger], api.Builder]
    BuilderFlag: api.BuilderFlag
    ILogger: type[api.ILogger]
    LayerInformationFormat: api.LayerInformationFormat
    MemoryPoolType: api.MemoryPoolType
    NetworkDefinitionCreationFlag: api.NetworkDefinitionCreationFlag
    OnnxParser: Callable[[api.INetworkDefinition, api.ILogger], api.OnnxParser]
    ProfilingVerbosity: api.ProfilingVerbosity
    Runtime: Callable[[api.ILogger], api.Runtime]
    TensorIOMode: api.TensorIOMode
    TensorLocation: api.TensorLocation


class RtxLibrary(Library, Protocol):
    """`tensorrt_rtx`."""

    ComputeCapability: api.RtxComputeCapability
