"""One ONNX node as one call: finds the function, binds attributes, says how inputs are read.

Attributes are keyword arguments, under their ONNX names. A parameter annotated `int`, `float`,
`bool` or a list of them receives Python values, read from the attribute or, in newer opsets, from
the input of that place; any other parameter receives an array. `opset` and `outputs` (how many the
node has) are filled in for a function that asks for them. A trailing underscore is no part of a
name. Arrays are NumPy's or torch's: nothing here depends on which.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx_graphsurgeon as gs

from onnx_intq.transform import IntqError

Function = Callable[..., Any]
"""Computes a node: arrays and Python values in, an array or a tuple of arrays out."""
Read = Callable[[Any], Any]


def scalar(array: Any) -> Any:
    """The Python value of an array with one element."""
    return array.reshape(()).tolist()


def _list(array: Any) -> Any:
    return array.reshape(-1).tolist()


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

    function: Function
    reads: tuple[Read | None, ...]

    def __call__(self, arrays: Sequence[Any]) -> Any:
        """The result on the inputs, None for an omitted one."""
        pairs = zip(arrays, self.reads, strict=True)
        return self.function(*(a if read is None or a is None else read(a) for a, read in pairs))


def bind(
    node: gs.Node,
    operators: Mapping[str, Function],
    *,
    opset: int,
    used_outputs: int,
    unknown: str,
    ignored: Collection[str] = (),
) -> Call:
    """The call that computes `node`.

    Args:
        node: A node without bodies.
        operators: Operator of the default domain -> function.
        opset: Version of the default domain.
        used_outputs: Number of outputs up to the last one that anybody reads.
        unknown: What to say of an operator that is not among `operators`.
        ignored: Attributes without meaning.

    Raises:
        IntqError: The operator, one of its attributes, the number of inputs or an output that is
            read is not supported.
    """
    place = f"node {node.name!r} ({node.op})"
    function = operators.get(node.op) if node.domain in (None, "", "ai.onnx") else None
    if function is None:
        found = f"{node.domain}.{node.op}" if node.domain else node.op
        raise IntqError(f"{place}: operator {found} {unknown}")
    parameters, hints = _parameters(function), _hints(function)
    options = {
        f"{k}_" if f"{k}_" in parameters else k: v
        for k, v in node.attrs.items()
        if k not in ignored
    }
    _check_attributes(place, options, parameters, hints)
    filled = {"opset": opset, "outputs": len(node.outputs)}
    options |= {k: v for k, v in filled.items() if k in parameters}
    if used_outputs > _results(hints.get("return")):
        raise IntqError(f"{place}: output {used_outputs} is not supported; expected it unused")
    _check_inputs(place, function, node, options)
    reads = tuple(_read(i, parameters, hints) for i in range(len(node.inputs)))
    bound = functools.partial(function, **options) if options else function
    return Call(function=bound, reads=reads)


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    """The parameters by name; empty for functions built into torch, which take tensors only."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _hints(function: Function) -> dict[str, Any]:
    return get_type_hints(function) if inspect.isfunction(function) else {}


def _check_inputs(
    place: str, function: Function, node: gs.Node, options: Mapping[str, Any]
) -> None:
    try:
        inspect.signature(function).bind(*node.inputs, **options)
    except TypeError as error:
        raise IntqError(f"{place}: {error}; check its inputs and attributes") from error
    except ValueError:  # built into torch: refuses when called
        return


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
    """The most arrays a function of this return type gives."""
    if isinstance(hint, UnionType):
        return max(map(_results, get_args(hint)))
    if get_origin(hint) is tuple:
        return float("inf") if Ellipsis in get_args(hint) else len(get_args(hint))
    return 1


def _read(
    position: int, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]
) -> Read | None:
    """How input `position` becomes a Python value; None where an array is wanted."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters.values() if p.kind in kinds]
    if position >= len(names):  # one of any number
        return None
    hint = hints.get(names[position])
    wanted = set(get_args(hint) if isinstance(hint, UnionType) else (hint,)) - {NoneType}
    return _READERS[wanted.pop()] if len(wanted) == 1 and wanted <= _READERS.keys() else None
