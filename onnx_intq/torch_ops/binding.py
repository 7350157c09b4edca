"""One ONNX node as one call: finds the function, binds attributes, says how inputs are read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx_graphsurgeon as gs
from torch import Tensor

from onnx_intq.torch_ops import OPS
from onnx_intq.transform import IntqError

Result = Tensor | tuple[Tensor, ...]
Read = Callable[[Tensor], Any]

_IGNORED = frozenset({"consumed_inputs"})
"""Below opset 6 it told a runtime which inputs it might overwrite."""


def scalar(tensor: Tensor) -> Any:
    """The Python value of a tensor with one element."""
    return tensor.reshape(()).tolist()


def _list(tensor: Tensor) -> Any:
    return tensor.reshape(-1).tolist()


_READERS: Mapping[Any, Read] = {
    bool: scalar,
    float: scalar,
    int: scalar,
    list[float]: _list,
    list[int]: _list,
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function with its attributes bound; `reads[i]` makes a Python value of input i, if set."""

    function: Callable[..., Result]
    reads: tuple[Read | None, ...]


def bind(node: gs.Node, opset: int, used_outputs: int) -> Call:
    """The call that computes `node`.

    Args:
        node: A node of the default domain, without bodies.
        opset: Version of the default domain.
        used_outputs: Number of outputs up to the last one that anybody reads.

    Raises:
        IntqError: The operator, one of its attributes, the number of inputs or an output that is
            read is not supported.
    """
    place = f"node {node.name!r} ({node.op})"
    function = OPS.get(node.op) if node.domain in (None, "", "ai.onnx") else None
    if function is None:
        raise IntqError(
            f"{place}: operator {_qualified(node)} cannot be run in torch; expected one of: "
            f"If, Loop, {', '.join(sorted(OPS))}; rewrite or remove it"
        )
    parameters, hints = _parameters(function), _hints(function)
    options = {_parameter(k, parameters): v for k, v in node.attrs.items() if k not in _IGNORED}
    _check_attributes(place, options, parameters, hints)
    filled = {"opset": opset, "outputs": len(node.outputs)}
    options |= {k: v for k, v in filled.items() if k in parameters}
    if used_outputs > _results(hints.get("return", Tensor)):
        raise IntqError(f"{place}: output {used_outputs} is not supported; expected it unused")
    _check_inputs(place, function, node, options)
    reads = tuple(_read(i, parameters, hints) for i in range(len(node.inputs)))
    return Call(
        function=functools.partial(function, **options) if options else function, reads=reads
    )


def _qualified(node: gs.Node) -> str:
    return f"{node.domain}.{node.op}" if node.domain else str(node.op)


def _parameters(function: Callable[..., Result]) -> Mapping[str, inspect.Parameter]:
    """The parameters by name; empty for functions built into torch, which take tensors only."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _hints(function: Callable[..., Result]) -> dict[str, Any]:
    return get_type_hints(function) if inspect.isfunction(function) else {}


def _parameter(attribute: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    return f"{attribute}_" if f"{attribute}_" in parameters else attribute


def _check_attributes(
    place: str,
    options: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
) -> None:
    """Refuse attributes that are no parameter, and values outside a parameter's `Literal`."""
    for name, value in options.items():
        if name not in parameters:
            raise IntqError(f"{place}: attribute {name!r} is not supported; remove it")
        allowed = get_args(hints[name]) if get_origin(hints[name]) is Literal else (value,)
        if value not in allowed:
            raise IntqError(
                f"{place}: attribute {name} = {value!r} is not supported; expected one of: "
                f"{', '.join(map(repr, allowed))}; export the model with one of these"
            )


def _results(hint: Any) -> float:
    """The most tensors a function of this return type gives."""
    if get_origin(hint) is tuple:
        return float("inf") if Ellipsis in get_args(hint) else len(get_args(hint))
    return max((_results(h) for h in get_args(hint)), default=1)


def _check_inputs(
    place: str, function: Callable[..., Result], node: gs.Node, options: Mapping[str, Any]
) -> None:
    try:
        inspect.signature(function).bind(*node.inputs, **options)
    except TypeError as error:
        raise IntqError(f"{place}: {error}; check its inputs and attributes") from error
    except ValueError:  # built into torch: refuses when called
        return


def _read(
    position: int, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]
) -> Read | None:
    positional = [
        p.name
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if position >= len(positional):
        return None
    hint = hints.get(positional[position], Tensor)
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if Tensor in kinds:
        return None
    return next((read for kind, read in _READERS.items() if kind in kinds), None)
