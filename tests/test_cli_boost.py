"""What raises accuracy by data, on the command line: boosters, mixed widths, data for attention."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnx_intq.feeds import write
from onnx_intq.recipes import pipeline
from onnx_intq.registry import parse, render
from onnx_intq.runtime import Session
from onnx_intq.speech import FRONTEND_KEY

Command = Callable[..., tuple[int, str, str]]
BOOST = ["round_weights", "correct_bias"]
"""The default."""
BOOSTERS = ["equalize", "choose_grids", *BOOST]


@pytest.fixture
def there(tiny: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Path:
    """A folder, made the current one, with `m.onnx`, feeds `f.npz` and ranges `r.json`."""
    monkeypatch.chdir(tiny.parent)
    random = np.random.default_rng(0)
    batches = [
        {"audio_signal": random.standard_normal((2, 4, 30)).astype(np.float32)} for _ in range(3)
    ]
    write(Path("f.npz"), batches)
    assert command("calibrate", "m.onnx", "--data", "f.npz", "-o", "r.json")[0] == 0
    return tiny.parent


def printed(outcome: tuple[int, str, str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    code, out, err = outcome
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def boosters(recipe: str) -> list[str]:
    """Those of a recipe, in its order."""
    return [spec.name for spec in parse(recipe) if spec.name in BOOSTERS]


def computed(name: str) -> npt.NDArray[np.float32]:
    """What a model makes of random numbers."""
    signal = np.random.default_rng(1).standard_normal((2, 4, 30)).astype(np.float32)
    return Session(name, threads=1).run({"audio_signal": signal})["log_probs"]


def integers(name: str) -> dict[str, npt.NDArray[np.int8]]:
    """The stored weights of a file."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(name).graph.initializer}
    return {n: v for n, v in tensors.items() if v.dtype == np.int8 and v.ndim == 3}


@pytest.mark.parametrize("target", ["ort", "tensorrt", "integer"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data", "f.npz"), BOOST),
        (("--method", "random"), BOOST),
        (("--ranges", "r.json"), []),
        (("--data", "f.npz", "--boost", "none"), []),
        (("--ranges", "r.json", "--boost", "none"), []),
        (("--data", "f.npz", "--boost", "correct_bias, equalize"), ["equalize", "correct_bias"]),
    ],
)
def test_boosters_run_where_there_is_data(
    there: Path, command: Command, target: str, options: tuple[str, ...], expected: list[str]
) -> None:
    given = ("--target", target, *options, "--json")
    found = printed(command("quantize", "m.onnx", "-o", "o.onnx", *given))
    assert boosters(found["recipe"]) == expected


def test_a_quantized_model_is_lowered_without_boosters(there: Path, command: Command) -> None:
    assert command("quantize", "m.onnx", "-o", "q.onnx", "--ranges", "r.json")[0] == 0
    options = ("--target", "integer", "--json")
    assert (
        boosters(printed(command("quantize", "q.onnx", "-o", "o.onnx", *options))["recipe"]) == []
    )


def test_weights_are_rounded_to_either_side(there: Path, command: Command) -> None:
    stored = {}
    for boost in ("none", "round_weights"):
        options = ("--data", "f.npz", "-w", 4, "--boost", boost, "--json")
        printed(command("quantize", "m.onnx", "-o", f"{boost}.onnx", *options))
        weights = integers(f"{boost}.onnx")
        stored[boost] = {name: values.astype(int) for name, values in weights.items()}
    assert stored["none"].keys() == stored["round_weights"].keys()
    moved = [
        np.abs(stored["none"][name] - stored["round_weights"][name]) for name in stored["none"]
    ]
    assert max(steps.max() for steps in moved) == 1


@pytest.mark.parametrize("target", ["ort", "tensorrt", "integer"])
def test_mixed_widths_keep_to_their_limit(there: Path, command: Command, target: str) -> None:
    options = ("--data", "f.npz", "-a", "mixed", "--target", target, "--verify", "--json")
    found = printed(command("quantize", "m.onnx", "-o", "o.onnx", *options))
    assert boosters(found["recipe"]) == ["choose_grids", *BOOST]
    assert found["drift"]["sqnr"] > 25  # the pass's limit
    expected = {"ConvInteger": 2} if target == "integer" else {"Conv": 2}
    assert found["quantized"] == expected
    assert found["integer_only"] is (True if target == "integer" else None)
    checks = ("--integer-only",) if target == "integer" else ("--target", target)
    assert command("check", "o.onnx", *checks)[0] == 0
    np.testing.assert_allclose(computed("o.onnx"), computed("m.onnx"), atol=0.5)


def test_what_needs_16_bits_is_reported(there: Path, command: Command) -> None:
    text = render(pipeline("integer", mixed=True))
    assert "choose_grids(target='integer')" in text
    recipe = text.replace("choose_grids(", "choose_grids(limit=60.0, ")
    options = ("--data", "f.npz", "--recipe", recipe, "--json")
    found = printed(command("quantize", "m.onnx", "-o", "o.onnx", *options))
    assert found["wide"]
    assert all(db < 60 for db in found["wide"].values())
    stored = {p.key: p.value for p in onnx.load("o.onnx").metadata_props}["onnx_intq.wide"]
    assert json.loads(stored) == found["wide"]


def test_run_equalizes_by_data(there: Path, command: Command) -> None:
    recipe = "fold_constants, drop_identity, fold_bn, equalize"
    options = ("--data", "f.npz", "-o", "e.onnx", "--verify", "--json")
    found = printed(command("run", recipe, "m.onnx", *options))
    assert [each["changes"] for each in found["passes"]] == [0, 0, 1, 1]
    # Equalization is exact but for the rounding of float32 products.
    np.testing.assert_allclose(computed("e.onnx"), computed("m.onnx"), rtol=1e-4, atol=1e-4)
    assert command("run", "fold_bn", "m.onnx", "-o", "b.onnx")[0] == 0
    weights = [
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(name).graph.initializer}
        for name in ("e.onnx", "b.onnx")
    ]
    assert any(
        name not in weights[1] or not np.array_equal(values, weights[1][name])
        for name, values in weights[0].items()
    )


def test_run_reads_speech_by_a_frontend_that_no_model_records(
    there: Path, speech: Path, command: Command
) -> None:
    proto = onnx.load("m.onnx")
    settings = {entry.key: entry.value for entry in proto.metadata_props}
    del proto.metadata_props[:]
    onnx.save(proto, "bare.onnx")
    Path("frontend.json").write_text(settings[FRONTEND_KEY])
    recipe = "fold_bn, equalize, insert_qdq, quantize_weights, round_weights, correct_bias"
    options = ("--data", speech, "--json")
    code, out, err = command("run", recipe, "bare.onnx", "-o", "o.onnx", *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]*--frontend[^\n]*\n", err)
    given = (*options, "--frontend", "frontend.json")
    found = printed(command("run", recipe, "bare.onnx", "-o", "o.onnx", *given))
    assert [each["pass"] for each in found["passes"]] == recipe.split(", ")
    assert printed(command("run", recipe, "m.onnx", "-o", "p.onnx", *options))["passes"]
    tensors = [onnx.load(name).graph.initializer for name in ("o.onnx", "p.onnx")]
    assert list(tensors[0]) == list(tensors[1])


NEEDS_DATA = r"needs data, which no earlier pass gives; .* or give --data\n"
WRONG = [
    ("quantize m.onnx -o o.onnx --data f.npz --boost turbo", "unknown booster 'turbo'; expected"),
    ("quantize m.onnx -o o.onnx --data f.npz --boost=", "unknown booster ''; expected some of"),
    ("quantize m.onnx -o o.onnx --data f.npz --boost none,equalize", "unknown booster 'none'"),
    ("quantize m.onnx -o o.onnx --ranges r.json --boost round_weights", NEEDS_DATA),
    ("quantize m.onnx -o o.onnx --ranges r.json --boost equalize", NEEDS_DATA),
    ("quantize m.onnx -o o.onnx --ranges r.json -a mixed", NEEDS_DATA),
    ("quantize m.onnx -o o.onnx --recipe fold_bn --boost none", "--boost has no effect beside"),
    ("quantize q.onnx -o o.onnx --target integer --boost none", "--boost has no effect on a model"),
    ("quantize m.onnx -o o.onnx --method entropy", r"no attention, MatMul\(Softmax\(\.\.\.\)"),
    ("synthesize m.onnx -o o.npz --method entropy", r"no attention, MatMul\(Softmax\(\.\.\.\)"),
    ("quantize m.onnx -o o.onnx --data f.npz --method entropy", "--method has no effect beside"),
    ("run fold_bn,equalize m.onnx -o o.onnx", NEEDS_DATA),
    ("run fold_bn,equalize m.onnx -o o.onnx --ranges r.json", NEEDS_DATA),
    ("run fold_bn,equalize m.onnx -o o.onnx --data nowhere.npz", "nowhere.npz: no such file"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_use_gives_one_line(there: Path, command: Command, line: str, message: str) -> None:
    if "q.onnx" in line:
        assert command("quantize", "m.onnx", "-o", "q.onnx", "--ranges", "r.json")[0] == 0
    code, out, err = command(*line.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert re.search(message, err)
    assert not {"o.onnx", "o.npz"} & {path.name for path in there.iterdir()}
