"""The GPU, through torch: whether there is one, its memory, its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_intq.transform import IntqError

if TYPE_CHECKING:
    import torch


CUDA = "cuda"
"""torch's name for the current GPU."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: its name and compute capability, such as "7.5"."""

    name: str
    compute_capability: str


def gpu() -> Gpu | None:
    """The current GPU, None if there is none that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(name=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}")


def require_gpu(what: str) -> Gpu:
    """The current GPU.

    Args:
        what: Needs it; the start of the message.

    Raises:
        IntqError: There is none.
    """
    found = gpu()
    if found is None:
        raise IntqError(f"{what} needs an NVIDIA GPU; expected one, but {_missing()}")
    return found


class Device:
    """Memory, a stream and a clock on the current GPU.

    Attributes:
        stream: The handle that CUDA libraries take.
    """

    def __init__(self) -> None:
        """Open a stream."""
        import torch

        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream: int = self._stream.cuda_stream

    def upload(self, values: npt.NDArray[Any], *, host: bool = False) -> torch.Tensor:
        """A copy of `values` in the device's memory, or in this process's."""
        import torch

        copy = torch.from_numpy(np.array(values, order="C"))
        return copy if host else copy.to(CUDA)

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], *, host: bool = False
    ) -> torch.Tensor:
        """Memory for an array."""
        return self.upload(np.empty(shape, dtype), host=host)

    def wait(self) -> None:
        """Wait for everything that was queued on the stream."""
        self._stream.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Time `work`, which queues on the stream, by the GPU's own clock."""
        import torch

        cuda: Any = torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        work()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def graph(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record `work`, which queues on the stream, as a CUDA graph; calling it queues that."""
        import torch

        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=self._stream):
            work()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                recorded.replay()

        return replay


def _missing() -> str:
    """Why there is no GPU, and what to do."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it"
    return f"torch {torch.__version__} finds none; check nvidia-smi and the driver"
