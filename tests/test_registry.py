import ast
import re
import subprocess
import sys
import types
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_intq import registry
from onnx_intq.registry import load, names, parse, render
from onnx_intq.transform import FACTS, Context, IntqError, Pass

ROOT = Path(__file__).parent.parent
PASSES = [path for path in sorted((ROOT / "passes").glob("*.py")) if path.stem != "__init__"]
law = settings(derandomize=True, deadline=None, max_examples=50)


@dataclass(frozen=True, kw_only=True)
class Example(Pass):
    """Options of every kind."""

    count: int = 8
    rate: float = 0.5
    deep: bool = False
    method: str = "mse"
    seed: int | None = None
    keep: tuple[str, ...] = ()
    pair: tuple[str, int] = ("a", 1)

    def run(self, model: gs.Graph, ctx: Context) -> int:
        return 0


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets recipes know a pass `test_registry`."""
    monkeypatch.setattr(registry, "load", lambda name: {"test_registry": Example}[name])


def values(hint: Any) -> st.SearchStrategy[Any]:
    """All values of an option of this type."""
    arguments = get_args(hint)
    if get_origin(hint) is types.UnionType:
        return st.one_of([values(one) for one in arguments])
    if get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(values, arguments))
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(),
        types.NoneType: st.none(),
    }
    return scalars[hint]


def instances(spec: type[Pass]) -> st.SearchStrategy[Pass]:
    hints = get_type_hints(spec)
    return st.builds(partial(spec), **{f.name: values(hints[f.name]) for f in fields(spec)})


everything = st.lists(st.one_of([instances(load(name)) for name in names()]), max_size=4)


@law
@given(everything)
def test_a_recipe_reads_back(passes: list[Pass]) -> None:
    text = render(passes)
    assert parse(text) == passes
    assert "\n" not in text


@law
@given(instances(Example))
def test_options_of_every_kind_read_back(one: Pass) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: Example)
        assert parse(str(one)) == [one]


def test_recipes_may_be_spread_over_lines_with_comments() -> None:
    text = """
        fold_constants,  # first
        insert_qdq(
            target="tensorrt",
        )  # last"""
    assert render(parse(text)) == "fold_constants, insert_qdq(target='tensorrt')"
    assert parse("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold_bn, nope", "unknown pass 'nope'; expected one of: .*fold_bn"),
        ("__init__", "unknown pass '__init__'"),
        ("fold_bn fold_bn", "cannot read recipe 'fold_bn fold_bn'; expected e.g. fold_bn"),
        ("fold_bn], [fold_bn", "expected names separated by commas"),
        ("fold_bn\0", "cannot read recipe"),
        ("-" * 100_000, "cannot read recipe"),
        ("fold_bn(1)", r"cannot read 'fold_bn\(1\)'; expected NAME or NAME\(option=value\)"),
        ("a.b", "cannot read 'a.b'"),
        ("a.b(c=1)", "cannot read"),
        ("'fold_bn\\n'", "cannot read"),
        ("*fold_bn", "cannot read"),
        ("fold_bn(bits=1)", "fold_bn has no option 'bits'; it takes none"),
        ("insert_qdq(bit=8)", "has no option 'bit'; expected one of: target, bits, keep"),
        ("insert_qdq(**{})", "has no option None"),
        ("insert_qdq(bits=8, bits=8)", "insert_qdq has option 'bits' twice"),
        ("insert_qdq(bits=x)", "option bits of insert_qdq: 'x' is no literal; expected int"),
        ("insert_qdq(bits={[]: 1})", "is no literal"),
        ("insert_qdq(bits=f'''\n''')", "is no literal"),
        ("insert_qdq(bits='8')", "option bits of insert_qdq: '8'; expected int"),
        ("insert_qdq(bits=True)", "option bits of insert_qdq: True; expected int"),
        ("insert_qdq(keep='conv*')", r"'conv\*'; expected tuple\[str, ...\]"),
        ("insert_qdq(keep=('a', 1))", r"expected tuple\[str, ...\]"),
        ("quantize_weights(overrides=(('a', 4, 4),))", r"expected tuple\[tuple\[str, int\], ...\]"),
    ],
)
def test_errors_are_one_line(text: str, message: str) -> None:
    with pytest.raises(IntqError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("example")
def test_options_have_the_type_they_are_annotated_with() -> None:
    (one,) = parse("test_registry(rate=1, seed=None, deep=True, pair=('b', 2))")
    assert one == Example(rate=1, deep=True, pair=("b", 2))
    for wrong in ("rate=False", "seed=0.5", "deep=1", "pair=('b',)", "pair=['b', 2]", "method=b''"):
        with pytest.raises(IntqError, match=f"option {wrong.partition('=')[0]} of test_registry"):
            parse(f"test_registry({wrong})")


def test_names_are_those_of_the_files() -> None:
    assert names() == [path.stem for path in PASSES]
    assert {"fold_bn", "insert_qdq", "quantize_weights"} <= set(names())


def test_passes_are_loaded_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert "ImportError: import onnx_intq.passes; a second copy" in result.stderr


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_a_pass_is_one_documented_class_of_its_own(path: Path) -> None:
    text = path.read_text()
    spec = load(path.stem)
    assert len(text.splitlines()) <= 200
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert all(re.search(rf"\b{word}:", doc) for word in ("Before", "After", "Condition", "Law"))
    assert spec().name == path.stem
    assert spec.needs | spec.gives <= FACTS
    assert all(f.default is not MISSING for f in fields(spec))
    assert not re.search(r"onnx_intq\.passes|from passes|import passes", text)


def is_recipe(text: str) -> bool:
    try:
        return bool(parse(text))
    except IntqError:
        return False


def test_only_recipes_name_passes() -> None:
    for path in (ROOT / "onnx_intq").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) onnx_intq\.passes\.", text, re.MULTILINE), path
        constants = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
        found = [value for value in constants if isinstance(value, str) and is_recipe(value)]
        assert bool(found) == (path.stem == "recipes"), (path, found)
