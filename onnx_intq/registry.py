"""Finds passes by file name and reads recipes: `fold_bn, insert_qdq(target='ort')` -> passes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import fields

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
        IntqError: The text is no recipe, or names an unknown pass or option.
    """
    try:
        body = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError) as error:
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
    known = [f.name for f in fields(found)]
    options: dict[str, object] = {}
    for keyword in item.keywords:
        if keyword.arg not in known:
            expected = f"expected one of: {', '.join(known)}" if known else "it takes none"
            raise IntqError(f"{item.func.id} has no option {keyword.arg!r}; {expected}")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise IntqError(
                f"option {keyword.arg} of {item.func.id}: {ast.unparse(keyword.value)!r} "
                "is no literal; expected a number, string, None or tuple"
            ) from error
    return found(**options)
