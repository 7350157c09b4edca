"""The sizes an engine is built for: smallest, most common and largest shape of every input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import onnx_graphsurgeon as gs

from onnx_intq.shapes import input_shapes
from onnx_intq.transform import IntqError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]
"""An input's smallest, most common and largest shape."""
SIZES = ((1, 2.0), (1, 10.0), (8, 20.0))
"""The batch and the seconds of audio of the three shapes where none are given."""
SHAPE = re.compile(r"\d+(x\d+)*", re.ASCII)


def read_shapes(texts: Iterable[str]) -> dict[str, Profile]:
    """The profiles of `--shapes` options, such as `x=1x64x200:1x64x1000:8x64x2000` or `x=1x64`.

    Raises:
        IntqError: A text is not of this form, or its shapes are not one or three.
    """
    found: dict[str, Profile] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        shapes = [_shape(part) for part in sizes.split(":") if SHAPE.fullmatch(part)]
        if not name or len(shapes) not in {1, 3} or len(shapes) != sizes.count(":") + 1:
            raise IntqError(
                f"--shapes {text!r}; expected INPUT=SHAPE or INPUT=SMALLEST:COMMON:LARGEST, "
                "such as audio_signal=1x64x200:1x64x1000:8x64x2000"
            )
        if name in found:
            raise IntqError(f"--shapes names {name!r} twice; expected it once; leave one out")
        small, common, large = shapes * (3 // len(shapes))
        found[name] = (small, common, large)
    return found


def profiles(graph: gs.Graph, given: Mapping[str, Profile]) -> dict[str, Profile]:
    """A profile for every input of `graph`: as given, else with the sizes of `SIZES`.

    Frames per second are those of the recorded front end. Axes that have the name of a given one
    take its sizes.

    Raises:
        IntqError: A given shape does not fit its input, or shrinks.
    """
    inputs = {t.name: declared(t) for t in graph.inputs}
    if unknown := sorted(set(given) - set(inputs)):
        names = ", ".join(inputs)
        raise IntqError(f"shapes given for {unknown[0]!r}; expected for one of: {names}")
    for name, shapes in given.items():
        check(name, inputs[name], shapes)
    found = [_shapes(graph, given, which) for which in range(3)]
    return {name: (found[0][name], found[1][name], found[2][name]) for name in inputs}


def check(name: str, axes: Sequence[int], shapes: Profile) -> None:
    """Refuse shapes that input `name` cannot have.

    Args:
        name: For the message.
        axes: The input's shape in the model, -1 for dynamic axes.
        shapes: The profile.

    Raises:
        IntqError: They do not fit, or shrink.
    """
    if not all(_fits(shape, axes) for shape in shapes):
        found = "do not fit"
    elif any(list(sizes) != sorted(sizes) for sizes in zip(*shapes, strict=True)):
        found = "shrink"
    else:
        return
    raise IntqError(
        f"shapes {text(shapes)} of input {name!r} {found}; expected a smallest, a common and a "
        f"largest shape that fit {list(axes)} (-1: any size); change --shapes"
    )


def declared(tensor: gs.Tensor) -> Shape:
    """The shape an input has in the model, -1 for dynamic axes."""
    return tuple(d if isinstance(d, int) and d >= 0 else -1 for d in tensor.shape or ())


def text(shapes: Iterable[Sequence[int]]) -> str:
    """Shapes as `read_shapes` reads them."""
    return ":".join("x".join(map(str, shape)) for shape in shapes)


def with_batch(graph: gs.Graph, shapes: Mapping[str, Shape], batch: int) -> dict[str, Shape]:
    """`shapes` with `batch` as first size of the inputs that leave it open."""
    open_inputs = {t.name for t in graph.inputs if declared(t)[:1] == (-1,)}
    return {
        name: (batch, *shape[1:]) if name in open_inputs else tuple(shape)
        for name, shape in shapes.items()
    }


def _shapes(graph: gs.Graph, given: Mapping[str, Profile], which: int) -> dict[str, Shape]:
    """The smallest (0), most common (1) or largest (2) shape of every input."""
    batch, seconds = SIZES[which]
    chosen = {name: shapes[which] for name, shapes in given.items()}
    named = {
        axis
        for t in graph.inputs
        if t.name in given
        for axis in t.shape or ()
        if not isinstance(axis, int)
    }
    found = input_shapes(graph, seconds=seconds, shapes=chosen)
    sized = with_batch(graph, found, batch)
    follow = {t.name for t in graph.inputs if (t.shape or [0])[0] in named}
    return {name: found[name] if name in follow else sized[name] for name in found} | chosen


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x"))


def _fits(shape: Sequence[int], axes: Sequence[int]) -> bool:
    return len(shape) == len(axes) and all(
        size >= 1 and axis in {-1, size} for size, axis in zip(shape, axes, strict=True)
    )
