"""An integer tensor of a graph under construction, with bounds; `onnx_intq.trace` computes with it.

Nodes are appended by a `Builder`, which shares constants and gives names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_intq.graph import Names
from onnx_intq.transform import IntqError

Array = npt.NDArray[Any]

Shape = Sequence[int | str] | None
TARGETS = ("integer", "tensorrt")
"""What may run the nodes: onnxruntime, or TensorRT."""


@dataclass
class Builder:
    """Adds nodes to a graph; equal constants share one initializer.

    Attributes:
        graph: Where the nodes go.
        names: In use; new tensors are numbered, for names are a good part of a small model's file.
        constants: Type, shape and bytes -> the initializer.
        name: Prefix of the names of the nodes.
        portable: Matrix products are of uint8 alone, which no processor saturates.
        target: Whose types to keep to, one of `TARGETS`: "tensorrt" has no tables of 8 bits, and
            is not relied upon to wrap in a Cast.
    """

    graph: gs.Graph
    names: Names
    constants: dict[tuple[str, tuple[int, ...], bytes], gs.Constant]
    name: str = "integer"
    portable: bool = True
    target: str = "integer"

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> gs.Constant:
        """An initializer with `values`, integers that `dtype` holds.

        Raises:
            AssertionError: It does not hold them.
        """
        array = np.ascontiguousarray(values, dtype).reshape(np.shape(values))
        if not np.array_equal(array, values):
            raise AssertionError(f"a constant that {array.dtype} does not hold: {values!r}")
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.constants:
            self.constants[key] = gs.Constant(self.names.number("c"), array)
        return self.constants[key]

    def node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: npt.DTypeLike,
        shape: Shape = None,
        **attrs: Any,
    ) -> gs.Variable:
        """Append a node; return its only output, of type `dtype` and, if known, `shape`."""
        output = gs.Variable(self.names.number("t"), dtype=np.dtype(dtype), shape=shape)
        name = f"{self.name}_{output.name}"
        self.graph.nodes.append(gs.Node(op, name, attrs, list(inputs), [output]))
        return output

    def value(self, tensor: gs.Tensor, low: int, high: int) -> Value:
        """A tensor of the graph as a `Value`; its elements are known to lie in [low, high]."""
        return Value(self, tensor, low, high)


@dataclass(eq=False)
class Value(np.lib.mixins.NDArrayOperatorsMixin):
    """An integer (or boolean) tensor of a graph under construction.

    Attributes:
        builder: Takes the nodes.
        tensor: The tensor.
        low: No element is below.
        high: No element is above.
    """

    builder: Builder
    tensor: gs.Tensor
    low: int
    high: int
    _casts: dict[np.dtype[Any], gs.Tensor] = field(default_factory=dict)

    HANDLERS: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The tensor's type in the graph."""
        found: np.dtype[Any] = np.dtype(self.tensor.dtype)
        return found

    def narrowed(self, low: int, high: int) -> Value:
        """The same tensor with the intersection of both intervals.

        Raises:
            AssertionError: They have none in common.
        """
        low, high = max(self.low, low), min(self.high, high)
        if low > high:
            raise AssertionError(f"nothing lies both in {self.low}..{self.high} and in the other")
        return Value(self.builder, self.tensor, low, high, self._casts)

    def astype(self, dtype: npt.DTypeLike, *, wrap: bool = False) -> gs.Tensor:
        """The tensor cast to `dtype`: nothing is emitted where it has that type already.

        Args:
            dtype: An integer type.
            wrap: Let elements out of its range wrap, as Cast is specified to do.
        """
        wanted = np.dtype(dtype)
        if wanted == self.dtype:
            return self.tensor
        if not wrap:
            info = np.iinfo(wanted)
            require(info.min <= self.low and self.high <= info.max, f"Cast to {wanted}", self)
        if wanted not in self._casts:
            number = onnx.helper.np_dtype_to_tensor_dtype(wanted)
            self._casts[wanted] = self.builder.node(
                "Cast", [self.tensor], wanted, self.tensor.shape, to=number
            )
        return self._casts[wanted]

    def __bool__(self) -> bool:
        raise TypeError("a branch on a traced value; expected np.where")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs or ufunc not in self.HANDLERS:
            return NotImplemented
        return self.HANDLERS[ufunc](*inputs)

    def __array_function__(
        self, function: Callable[..., Any], _: Any, args: Any, kwargs: Any
    ) -> Any:
        if function not in self.HANDLERS:
            return NotImplemented
        return self.HANDLERS[function](*args, **kwargs)


Operand = Value | Array | int


def lowest(operand: Operand) -> int:
    """No element of `operand` is below."""
    return operand.low if isinstance(operand, Value) else int(np.min(_integers(operand)))


def highest(operand: Operand) -> int:
    """No element of `operand` is above."""
    return operand.high if isinstance(operand, Value) else int(np.max(_integers(operand)))


def _integers(constant: Array | int) -> Array | int:
    if np.asarray(constant).dtype.kind in "fc":
        raise TypeError("a float beside a traced value; expected integers")
    return constant


def require(holds: bool, what: str, *operands: Operand) -> None:
    """Refuse an operation whose operands' bounds do not suit it.

    Raises:
        IntqError: With the bounds found.
    """
    if not holds:
        found = ", ".join(f"{lowest(x)}..{highest(x)}" for x in operands)
        raise IntqError(
            f"{what}: operands in {found} leave the integers' range; expected narrower inputs; "
            "use fewer bits, or keep the node float"
        )
