"""Runs an engine on the GPU, with the interface of `runtime.Session`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_intq.engine_build import information
from onnx_intq.engine_log import Log, logger
from onnx_intq.engine_profile import Profile, text
from onnx_intq.feeds import Batch, TensorSpec, check
from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    import torch

    from onnx_intq.engine_device import Device
    from onnx_intq.engine_library import Library

DTYPES: Mapping[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""NumPy's types for the library's."""


class EngineSession:
    """An engine loaded onto the GPU.

    Attributes:
        inputs: What `run` takes.
        outputs: What `run` gives.
        metadata: The `metadata_props` of the model it was built of, as its sidecar records them.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]

    def __init__(
        self,
        trt: Library,
        engine: bytes,
        device: Device,
        *,
        name: str = "engine",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Load `engine`.

        Args:
            trt: The library that built it.
            engine: As the library serialized it.
            device: Where to run it.
            name: For messages.
            metadata: Of its model.

        Raises:
            IntqError: The library refuses it, or it has tensors of a type NumPy has not.
        """
        self._trt, self._device, self._name = trt, device, name
        self._log = Log()
        self._logger = logger(trt, self._log)
        self._runtime = trt.Runtime(self._logger)  # must outlive the engine
        loaded = self._runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise self._error("cannot be loaded", "an engine built by this version on such a GPU")
        self._engine = loaded
        context = loaded.create_execution_context()
        if context is None:
            raise self._error("cannot be run", "enough free memory on the GPU")
        self._context = context
        names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
        given = {n for n in names if loaded.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self._host = {n for n in names if loaded.get_tensor_location(n) == trt.TensorLocation.HOST}
        self.inputs = tuple(self._spec(n) for n in names if n in given)
        self.outputs = tuple(self._spec(n) for n in names if n not in given)
        self.metadata = dict(metadata or {})
        self._memory: dict[str, torch.Tensor] = {}

    def run(self, feeds: Batch, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Run the engine once.

        Args:
            feeds: One array per input, of a shape the engine was built for.
            names: The outputs wanted, None for all.

        Raises:
            IntqError: The feeds do not fit, an output does not exist, or running fails.
        """
        known = [output.name for output in self.outputs]
        wanted = known if names is None else list(names)
        if unknown := [name for name in wanted if name not in known]:
            raise IntqError(
                f"{self._name}: no output {unknown[0]!r}; expected one of: {', '.join(known)}"
            )
        self._bind(feeds)
        self._enqueue()
        self._device.wait()
        return {name: self._memory[name].cpu().numpy() for name in wanted}

    def timer(self, feeds: Batch, *, graph: bool = False) -> Callable[[], float]:
        """A function that runs the engine once and returns the GPU's seconds, copies left out.

        Args:
            feeds: As for `run`; they stay in the GPU's memory. The function is good until the next
                call of `run` or `timer`.
            graph: Whether to replay a CUDA graph in place of queueing every kernel.

        Raises:
            IntqError: As for `run`.
        """
        self._bind(feeds)
        self._enqueue()  # what is done but once must not be recorded
        self._device.wait()
        work = self._device.graph(self._enqueue) if graph else self._enqueue
        return lambda: self._device.seconds(work)

    def profile(self, name: str) -> Profile:
        """The smallest, most common and largest shape of an input."""
        small, common, large = map(tuple, self._engine.get_tensor_profile_shape(name, 0))
        return small, common, large

    def describe(self) -> str:
        """The inspector's JSON about the engine's layers."""
        return information(self._trt, self._engine)

    def _bind(self, feeds: Batch) -> None:
        """Copy `feeds` to the device, make room for the outputs, and tell the engine where."""
        check(feeds, self.inputs)
        for spec in self.inputs:
            self._set_shape(spec.name, feeds[spec.name].shape)
        inputs = {
            s.name: self._device.upload(feeds[s.name], host=s.name in self._host)
            for s in self.inputs
        }
        self._point_at(inputs)  # before shapes are asked for: values of host inputs may decide them
        if missing := self._context.infer_shapes():
            raise self._error(f"cannot tell the shapes without {missing[0]!r}", "all inputs")
        outputs = {s.name: self._room(s) for s in self.outputs}
        self._point_at(outputs)
        self._memory = inputs | outputs  # must live until the run is done

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._context.set_input_shape(name, shape):
            return
        small, _, large = self.profile(name)
        raise IntqError(
            f"{self._name}: input {name!r} has shape {text([shape])}; this engine takes "
            f"{text([small])} to {text([large])}; build it with other --shapes"
        )

    def _room(self, spec: TensorSpec) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) < 0:
            raise self._error(
                f"decides the shape of {spec.name!r} as it runs", "shapes known before"
            )
        return self._device.empty(shape, spec.dtype, host=spec.name in self._host)

    def _point_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise self._error("does not run", "feeds of shapes it was built for")

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in DTYPES:
            raise IntqError(
                f"{self._name}: {name!r} has type {dtype}; expected one of NumPy's types; build an "
                "engine with float inputs and outputs"
            )
        shape = tuple(self._engine.get_tensor_shape(name))
        sizes = tuple(size if size >= 0 else None for size in shape)
        return TensorSpec(name=name, dtype=np.dtype(DTYPES[dtype]), shape=sizes)

    def _error(self, found: str, expected: str) -> IntqError:
        return IntqError(
            f"{self._name}: {found} ({self._log.first_error}); expected {expected}; build it again "
            "here"
        )
