import pytest

from onnx_intq.cli import cli
from onnx_intq.options import Overrides, split_overrides
from onnx_intq.transform import IntqError


def test_overrides_are_told_apart_in_order() -> None:
    texts = ("a*=6", "b=float", "c=d=a16", "a1=4")
    expected = Overrides(keep=("b",), wide=("c=d",), bits=(("a*", 6), ("a1", 4)))
    assert split_overrides(texts) == expected
    assert split_overrides(()) == Overrides((), (), ())
    assert split_overrides(("a=b=3", "*=1"), 1, ()).bits == (("a=b", 3), ("*", 1))


@pytest.mark.parametrize("text", ["a", "a=", "=6", "a=9", "a=1", "a=w6", "a=a8", "a=FLOAT"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(IntqError, match=r"expected NODES=BITS, 2\.\.8, NODES=a16 or NODES=float"):
        split_overrides((text,))


@pytest.mark.parametrize("text", ["a", "a=", "=3", "a=0", "a=9", "a=float", "a=a16"])
def test_words_that_a_command_has_not_are_refused(text: str) -> None:
    with pytest.raises(IntqError, match=r"expected NODES=BITS, 1\.\.8$"):
        split_overrides((text,), 1, ())


@pytest.mark.parametrize(
    "line",
    [
        "quantize m.onnx -o o.onnx --recipe fold_bn -w 4",
        "quantize m.onnx -o o.onnx --recipe fold_bn --target tensorrt",
        "quantize m.onnx -o o.onnx --recipe fold_bn --override *=float",
        "quantize m.onnx -o o.onnx --data f.npz --method random",
        "quantize m.onnx -o o.onnx --ranges r.json --device cuda",
        "synthesize m.onnx -o o.npz --method random --steps 3",
    ],
)
def test_options_without_effect_are_refused(line: str) -> None:
    with pytest.raises(IntqError, match=r"^-.* has no effect .*leave one out$"):
        cli.main(line.split(), standalone_mode=False)
