"""Reads fields of a NeMo configuration: each of one type, a wrong one refused with its path."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_intq.transform import IntqError

Section = Mapping[str, object]


def class_name(target: str) -> str:
    """The last part of a dotted name: NeMo's classes have moved between modules."""
    return target.rpartition(".")[2]


def refuse(where: str, found: Section, only: Mapping[str, object]) -> None:
    """Check options that change the result; those that are absent have NeMo's defaults.

    Raises:
        IntqError: Listing each option of `only` that has another value.
    """
    other = [
        f"{where}.{key} is {found[key]!r}; only {value!r} is supported"
        for key, value in only.items()
        if found.get(key, value) != value
    ]
    if other:
        raise IntqError(f"{'; '.join(other)}; export the model to ONNX with NeMo instead")


def items(where: str, value: object) -> list[object]:
    """A list that is not empty.

    Raises:
        IntqError: It is something else.
    """
    if not isinstance(value, list) or not value:
        raise IntqError(f"{where} is {value!r}; expected a list that is not empty")
    return value


def only_one(where: str, value: object) -> int:
    """A whole number, or the only one in a list.

    Raises:
        IntqError: It is something else.
    """
    return whole(where, value[0] if isinstance(value, list) and len(value) == 1 else value)


def whole(where: str, value: object) -> int:
    """A whole number.

    Raises:
        IntqError: It is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected a whole number")
    return value


def real(where: str, value: object) -> float:
    """A number.

    Raises:
        IntqError: It is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected a number")
    return float(value)


def flag(where: str, value: object) -> bool:
    """True or false.

    Raises:
        IntqError: It is something else.
    """
    if not isinstance(value, bool):
        raise IntqError(f"{where} is {value!r}; expected true or false")
    return value


def text(where: str, value: object) -> str:
    """Text.

    Raises:
        IntqError: It is something else.
    """
    if not isinstance(value, str):
        raise IntqError(f"{where} is {value!r}; expected text")
    return value
