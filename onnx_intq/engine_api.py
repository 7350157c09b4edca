"""The part of TensorRT's Python API that is used here, typed: classes by NVIDIA's names.

mypy lets the code use no other name, and `tools/check_trt_api.py` looks every one up, with its
parameters, in the bindings of each release: classes `Rtx...` in TensorRT-RTX's alone.
Source: docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api.
"""

# ruff: noqa: D102 A002 - NVIDIA documents the methods, and named their parameters

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, SupportsInt

Dims = Sequence[int]
"""A shape; -1 for dynamic axes."""


class ILogger(Protocol):
    """Takes the library's messages; to be subclassed."""

    ERROR: SupportsInt

    def log(self, severity: SupportsInt, msg: str) -> None: ...


class LayerType(Protocol):
    """Such as CONVOLUTION."""

    name: str


class DataType(Protocol):
    """Such as FLOAT."""

    name: str


class ProfilingVerbosity(Protocol):
    """How much an engine tells of its layers."""

    DETAILED: ProfilingVerbosity


class NetworkDefinitionCreationFlag(Protocol):
    """Bits of `Builder.create_network`'s flags."""

    STRONGLY_TYPED: SupportsInt


class MemoryPoolType(Protocol):
    """Memory that the builder may use."""

    WORKSPACE: MemoryPoolType


class BuilderFlag(Protocol):
    """Options of a build."""

    EDITABLE_TIMING_CACHE: BuilderFlag
    ERROR_ON_TIMING_CACHE_MISS: BuilderFlag


class LayerInformationFormat(Protocol):
    """Formats of the inspector's text."""

    JSON: LayerInformationFormat


class TensorIOMode(Protocol):
    """Whether a tensor goes in or out."""

    INPUT: TensorIOMode


class TensorLocation(Protocol):
    """Where a tensor's memory lies."""

    HOST: TensorLocation


class ITensor(Protocol):
    """A tensor of a network."""

    name: str
    shape: Dims
    is_network_input: bool
    is_network_output: bool


class ILayer(Protocol):
    """A layer of a network."""

    name: str
    type: LayerType

    def get_input(self, index: int) -> ITensor: ...

    def get_output(self, index: int) -> ITensor: ...


class INetworkDefinition(Protocol):
    """What the parser makes of a model."""

    num_layers: int
    num_inputs: int

    def get_layer(self, index: int) -> ILayer: ...

    def get_input(self, index: int) -> ITensor: ...


class IHostMemory(Protocol):
    """Bytes that the library owns."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    """How long each kernel took that was tried."""

    def serialize(self) -> IHostMemory: ...


class IOptimizationProfile(Protocol):
    """The shapes an engine is built for."""

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None: ...


class IBuilderConfig(Protocol):
    """How to build."""

    profiling_verbosity: ProfilingVerbosity

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None: ...

    def set_flag(self, flag: BuilderFlag) -> None: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...


class Builder(Protocol):
    """Makes networks and engines."""

    def create_builder_config(self) -> IBuilderConfig: ...

    def create_network(self, flags: int) -> INetworkDefinition: ...

    def create_optimization_profile(self) -> IOptimizationProfile: ...

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None: ...


class ParserError(Protocol):
    """Why a node was refused."""

    def desc(self) -> str: ...

    def node(self) -> int: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...

    def local_function_stack(self) -> list[str]: ...


class OnnxParser(Protocol):
    """Reads ONNX into a network, and owns the weights until the engine is built."""

    num_errors: int

    def parse_from_file(self, model: str) -> bool: ...

    def get_error(self, index: int) -> ParserError: ...


class EngineInspector(Protocol):
    """Describes an engine's layers."""

    def get_engine_information(self, format: LayerInformationFormat) -> str: ...


class IExecutionContext(Protocol):
    """One run's state."""

    def set_input_shape(self, name: str, shape: Dims) -> bool: ...

    def infer_shapes(self) -> list[str]: ...

    def get_tensor_shape(self, name: str) -> Dims: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """A deserialized engine."""

    num_io_tensors: int

    def create_engine_inspector(self) -> EngineInspector: ...

    def create_execution_context(self) -> IExecutionContext | None: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_mode(self, name: str) -> TensorIOMode: ...

    def get_tensor_dtype(self, name: str) -> DataType: ...

    def get_tensor_shape(self, name: str) -> Dims: ...

    def get_tensor_location(self, name: str) -> TensorLocation: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]: ...


class Runtime(Protocol):
    """Reads engines."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


class RtxComputeCapability(Protocol):
    """The GPU kinds it builds for, such as SM86."""

    __members__: Mapping[str, RtxComputeCapability]


class RtxIBuilderConfig(IBuilderConfig, Protocol):
    """TensorRT-RTX builds for a GPU kind by name; TensorRT for the GPU at hand."""

    num_compute_capabilities: int

    def set_compute_capability(
        self, compute_capability: RtxComputeCapability, index: int
    ) -> bool: ...


class RtxOnnxParser(OnnxParser, Protocol):
    """TensorRT-RTX's parser asks what it parses for; TensorRT 10.13's does not."""

    def set_builder_config(self, builder_config: IBuilderConfig) -> bool: ...
