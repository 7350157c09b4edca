"""TensorRT without a GPU: the part of its API that is used, by its documentation, on onnxruntime.

Memory is this process's: addresses are read and written as they are. Models tell it to fail: an
operator of the domain `own` cannot be parsed, `Det` not built, `Crash` ends the process.
"""

# ruff: noqa: A002 - the parameters have NVIDIA's names

import base64
import ctypes
import enum
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

__version__ = "10.16.1"
HAS_GPU = True
OUT_OF_MEMORY = False
STREAM = 7
"""The one stream there is."""
HOST: set[str] = set()
"""Names of tensors that lie in the host's memory."""
UNSHAPED: set[str] = set()
"""Names of outputs whose shape is known only afterwards."""
TYPE_KEY = "Format/Datatype"
"""10.x; in 11.x "Datatype"."""
MAGIC = b"fake plan "
KINDS = {
    "Conv": "CONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
Dims = Sequence[int]


class ILogger:
    ERROR = 1

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    DETAILED = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
BuilderFlag = enum.Enum("BuilderFlag", "EDITABLE_TIMING_CACHE ERROR_ON_TIMING_CACHE_MISS")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
LayerType = enum.Enum("LayerType", "ELEMENTWISE CONVOLUTION MATRIX_MULTIPLY QUANTIZE DEQUANTIZE")
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 INT64 UINT8 BOOL BF16")
TYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(bfloat16)": "BF16"}
SIZES: dict[str, npt.DTypeLike] = {"FLOAT": np.float32, "INT64": np.int64}


class ITensor:
    def __init__(self, name: str, shape: Dims, model: onnx.GraphProto) -> None:
        self.name, self.shape = name, shape
        self.is_network_input = name in {value.name for value in model.input}
        self.is_network_output = name in {value.name for value in model.output}


class ILayer:
    def __init__(self, node: onnx.NodeProto, model: onnx.GraphProto) -> None:
        self.name = node.name or f"node_of_{node.output[0]}"
        self.type = LayerType[KINDS.get(node.op_type, "ELEMENTWISE")]
        self._node, self._model = node, model

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._node.input[index], (), self._model)

    def get_output(self, index: int) -> ITensor:
        return ITensor(self._node.output[index], (), self._model)


class INetworkDefinition:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_layer(self, index: int) -> ILayer:
        return ILayer(self.model.graph.node[index], self.model.graph)

    def get_input(self, index: int) -> ITensor:
        value = self.model.graph.input[index]
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
        return ITensor(value.name, shape, self.model.graph)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.known: dict[str, int] = json.loads(content or b"{}")
        self.release = self.known.pop("release", 10)

    def serialize(self) -> bytes:
        return json.dumps(self.known, sort_keys=True).encode()


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.shapes: dict[str, list[list[int]]] = {}
        self.workspace = 0
        self.flags: set[str] = set()
        self.cache: ITimingCache | None = None

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.shapes = profile.shapes
        return 0

    def set_memory_pool_limit(self, pool: enum.Enum, pool_size: int) -> None:
        assert pool.name == "WORKSPACE"
        self.workspace = pool_size

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.add(flag.name)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return bool(cache.release == 10)


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if not HAS_GPU:
            logger.log(ILogger.ERROR, "CUDA initialization failure\nwith error: 35.")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self._times = 0

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED), "weakly typed"
        return INetworkDefinition()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        assert config.profiling_verbosity == ProfilingVerbosity.DETAILED
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        for node, layer in zip(network.model.graph.node, layers, strict=True):
            if node.op_type == "Crash":
                os.abort()
            if node.op_type == "Det":
                self._logger.log(ILogger.ERROR, f"no implementation for node {layer.name}.")
                return None
        known = config.cache.known if config.cache else {}
        missing = [layer.name for layer in layers if layer.name not in known]
        if missing and "ERROR_ON_TIMING_CACHE_MISS" in config.flags:
            self._logger.log(ILogger.ERROR, f"Timing cache miss for {missing[0]}")
            return None
        known |= dict.fromkeys(missing, int.from_bytes(os.urandom(2)))
        plan = {
            "shapes": config.shapes,
            "workspace": config.workspace,
            "tactics": {layer.name: known[layer.name] for layer in layers},
            "model": base64.b64encode(network.model.SerializeToString()).decode(),
        }
        return MAGIC + json.dumps(plan).encode()


class ParserError:
    def __init__(self, index: int, node: onnx.NodeProto) -> None:
        self._index, self._node = index, node

    def desc(self) -> str:
        return f"no importer for {self._node.op_type}\nat all."

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def local_function_stack(self) -> list[str]:
        return []


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def parse_from_file(self, model: str) -> bool:
        graph = onnx.load(model)
        if graph.graph.name == "unexplained":
            self._logger.log(ILogger.ERROR, "something is wrong.")
            return False
        nodes = enumerate(graph.graph.node)
        self._errors = [ParserError(i, n) for i, n in nodes if n.domain == "own"]
        self._network.model.CopyFrom(graph)
        return not self._errors

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class EngineInspector:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model

    def get_engine_information(self, format: enum.Enum) -> str:
        assert format.name == "JSON"
        made = {name: n.op_type for n in self._model.graph.node for name in n.output}
        layers = [self._layer(node, made) for node in self._model.graph.node]
        return json.dumps({"Layers": ["a layer without details", *layers]})

    def _layer(self, node: onnx.NodeProto, made: dict[str, str]) -> dict[str, Any]:
        int8 = made.get(node.input[0]) == "DequantizeLinear"
        told = "Thirty-two wide channel vectorized row major Int8 format" if int8 else "FP32"
        return {
            "Name": f"{node.output[0]} + more",
            "LayerType": "CaskConvolution" if node.op_type == "Conv" else "PointWiseV2",
            "Inputs": [{"Name": node.input[0], TYPE_KEY: told}],
            "Outputs": [{"Name": node.output[0], TYPE_KEY: "Row major linear FP16"}],
            "Metadata": f"[ONNX Layer: {node.name}]",
        }


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self.model = onnx.ModelProto.FromString(base64.b64decode(plan["model"]))
        self.shapes = plan["shapes"]
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString())
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.logger = logger

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.model)

    def create_execution_context(self) -> "IExecutionContext | None":
        return None if OUT_OF_MEMORY else IExecutionContext(self)

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = [*self.inputs, *self.outputs]
        return names[index]

    def get_tensor_mode(self, name: str) -> enum.Enum:
        return TensorIOMode["INPUT" if name in self.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> enum.Enum:
        return DataType[TYPES[(self.inputs | self.outputs)[name].type]]

    def get_tensor_shape(self, name: str) -> Dims:
        shape = (self.inputs | self.outputs)[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_location(self, name: str) -> enum.Enum:
        return TensorLocation["HOST" if name in HOST else "DEVICE"]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert profile_index == 0
        return [tuple(shape) for shape in self.shapes[name]]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, Dims] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        small, _, large = self._engine.get_tensor_profile_shape(name, 0)
        if not all(lo <= size <= hi for lo, size, hi in zip(small, shape, large, strict=True)):
            return False
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        read = {name for name in self._engine.inputs if name in HOST}
        return sorted(read - set(self._addresses))

    def get_tensor_shape(self, name: str) -> Dims:
        if name in self._engine.inputs:
            return self._shapes[name]
        if name in UNSHAPED or set(self._shapes) != set(self._engine.inputs):
            return (-1,) * len(self._engine.outputs[name].shape)
        zeros = {n: np.zeros(s, self._dtype(n)) for n, s in self._shapes.items()}
        return tuple(self._engine.session.run([name], zeros)[0].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if stream_handle != STREAM or set(self._addresses) != {*engine.inputs, *engine.outputs}:
            engine.logger.log(ILogger.ERROR, "an address is missing")
            return False
        feeds = {name: self._read(name) for name in engine.inputs}
        for name, values in zip(engine.outputs, engine.session.run(None, feeds), strict=True):
            content = np.ascontiguousarray(values).tobytes()
            ctypes.memmove(self._addresses[name], content, len(content))
        return True

    def _dtype(self, name: str) -> npt.DTypeLike:
        return SIZES[self._engine.get_tensor_dtype(name).name]

    def _read(self, name: str) -> npt.NDArray[Any]:
        count = int(np.prod(self._shapes[name]))
        size = count * np.dtype(self._dtype(name)).itemsize
        content = ctypes.string_at(self._addresses[name], size)
        return np.frombuffer(content, self._dtype(name)).reshape(self._shapes[name])


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not serialized_engine.startswith(MAGIC):
            self._logger.log(ILogger.ERROR, "Serialization assertion failed: version tag.")
            return None
        return ICudaEngine(json.loads(serialized_engine[len(MAGIC) :]), self._logger)
