"""The sizes an engine is built for: smallest, most common and largest shape of every input."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_intq.transform import IntqError

Shape = Sequence[int]
Profile = tuple[Shape, Shape, Shape]
"""An input's smallest, most common and largest shape."""
BATCH, TIME = (1, 1, 8), (64, 512, 2048)
"""Sizes of dynamic axes where none are given: of axis 0, and of all others."""


def profile(name: str, declared: Shape, given: Sequence[Shape] | None) -> list[list[int]]:
    """The three shapes of input `name`: `given` if that fits, by default from `BATCH` and `TIME`.

    Args:
        name: For the message.
        declared: The input's shape in the model, -1 for dynamic axes.
        given: Three shapes, or None.

    Raises:
        IntqError: `given` does not fit.
    """
    if given is None:
        sizes = [BATCH, *[TIME] * len(declared)]
        return [
            [d if d >= 0 else s[which] for d, s in zip(declared, sizes, strict=False)]
            for which in range(3)
        ]
    shapes = [list(shape) for shape in given]
    if len(shapes) != 3 or not all(_fits(shape, declared) for shape in shapes):
        found = "do not fit"
    elif any(list(sizes) != sorted(sizes) for sizes in zip(*shapes, strict=True)):
        found = "do not grow"
    else:
        return shapes
    raise IntqError(
        f"shapes {shapes} of input {name!r} {found}; expected a smallest, a common and a largest "
        f"shape that fit {list(declared)} (-1: any size); change --shapes"
    )


def _fits(shape: Shape, declared: Shape) -> bool:
    return len(shape) == len(declared) and all(
        size >= 1 and axis in {-1, size} for size, axis in zip(shape, declared, strict=True)
    )
