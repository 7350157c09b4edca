import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq.engine_profile import profile
from onnx_intq.transform import IntqError


def test_dynamic_axes_have_defaults() -> None:
    assert profile("x", (-1, 64, -1), None) == [[1, 64, 64], [1, 64, 512], [8, 64, 2048]]
    assert profile("length", (-1,), None) == [[1], [1], [8]]
    assert profile("x", (2, 3), None) == [[2, 3]] * 3
    assert profile("scalar", (), None) == [[], [], []]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 9), min_size=3, max_size=3))))
def test_shapes_that_fit_are_kept(axes: list[tuple[bool, list[int]]]) -> None:
    sizes = [sorted(s) if dynamic else s[:1] * 3 for dynamic, s in axes]
    declared = [-1 if dynamic else s[0] for dynamic, s in axes]
    given_shapes = [[s[which] for s in sizes] for which in range(3)]
    assert profile("x", declared, given_shapes) == given_shapes


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4), (1, 4)], "do not fit"),
        ([(1, 4), (2, 4), (3, 4, 5)], "do not fit"),
        ([(1, 4), (2, 5), (3, 4)], "do not fit"),
        ([(0, 4), (2, 4), (3, 4)], "do not fit"),
        ([(3, 4), (2, 4), (3, 4)], "do not grow"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(IntqError, match=f"of input 'x' {message}; expected .* fit"):
        profile("x", (-1, 4), shapes)
