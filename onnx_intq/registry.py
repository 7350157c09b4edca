"""Finds passes by file name and reads recipes: `fold_bn, insert_qdq(target='ort')` -> passes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import Field, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import onnx_intq.passes
from onnx_intq.transform import IntqError, Pass


def names() -> list[str]:
    """The names of all passes: the files of the folder `passes`, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(onnx_intq.passes.__path__))


def load(name: str) -> type[Pass]:
    """The pass class in file `name`.

    Raises:
        IntqError: There is no such pass.
    """
    if name not in names():
        raise IntqError(f"unknown pass {name!r}; expected one of: {', '.join(names())}")
    module = importlib.import_module(f"onnx_intq.passes.{name}")
    (found,) = (
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Pass) and c.__module__ == module.__name__
    )
    return found


def parse(text: str) -> list[Pass]:
    """Read a recipe: comma-separated pass names, options as keyword arguments in Python syntax.

    Law: `parse(", ".join(map(str, passes))) == passes`.

    Raises:
        IntqError: The text is no recipe, names an unknown pass or option, or gives an option a
            value of another type than its own.
    """
    try:
        # A comment may end the text, so the bracket stands on a line of its own.
        body = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise IntqError(f"cannot read recipe {text!r}; expected e.g. fold_bn, x(bits=8)") from error
    if not isinstance(body, ast.List):
        raise IntqError(f"cannot read recipe {text!r}; expected names separated by commas")
    return [_pass_from_ast(item) for item in body.elts]


def render(passes: Sequence[Pass]) -> str:
    """Recipe text that `parse` reads back."""
    return ", ".join(map(str, passes))


def _pass_from_ast(item: ast.expr) -> Pass:
    if isinstance(item, ast.Name):
        return load(item.id)()
    if not (isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and not item.args):
        raise IntqError(f"cannot read {ast.unparse(item)!r}; expected NAME or NAME(option=value)")
    found = load(item.func.id)
    known = {f.name: f for f in fields(found)}
    options: dict[str, object] = {}
    for keyword in item.keywords:
        if keyword.arg not in known:
            expected = f"expected one of: {', '.join(known)}" if known else "it takes none"
            raise IntqError(f"{item.func.id} has no option {keyword.arg!r}; {expected}")
        if keyword.arg in options:
            raise IntqError(f"{item.func.id} has option {keyword.arg!r} twice; expected it once")
        options[keyword.arg] = _value(found, known[keyword.arg], keyword.value)
    return found(**options)


def _value(spec: type[Pass], option: Field[Any], text: ast.expr) -> object:
    name = f"option {option.name} of {spec.__module__.rpartition('.')[2]}"
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, TypeError) as error:
        raise IntqError(
            f"{name}: {ast.unparse(text)!r} is no literal; expected {option.type}"
        ) from error
    if not _fits(value, get_type_hints(spec)[option.name]):
        raise IntqError(f"{name}: {value!r}; expected {option.type}")
    return value


def _fits(value: object, hint: Any) -> bool:
    """Whether a literal has the type a field is annotated with: a scalar, tuple or union."""
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in arguments)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    # True is no integer here, and 1 is as good as 1.0.
    return type(value) in ({int, float} if hint is float else {hint})
