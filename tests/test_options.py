import pytest

from onnx_intq.options import Overrides, split_overrides
from onnx_intq.transform import IntqError


def test_overrides_are_told_apart_in_order() -> None:
    texts = ("a*=6", "b=float", "c=d=a16", "a1=4")
    expected = Overrides(keep=("b",), wide=("c=d",), bits=(("a*", 6), ("a1", 4)))
    assert split_overrides(texts) == expected
    assert split_overrides(()) == Overrides((), (), ())


@pytest.mark.parametrize("text", ["a", "a=", "=6", "a=9", "a=1", "a=w6", "a=a8", "a=FLOAT"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(IntqError, match=r"expected NODES=BITS, 2\.\.8, NODES=a16 or NODES=float"):
        split_overrides((text,))
