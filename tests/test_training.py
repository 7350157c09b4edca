"""Quantization-aware training, from the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnx_intq import feeds, training_loop
from onnx_intq.cost import BITS_KEY
from onnx_intq.frontend import Frontend
from onnx_intq.graph import load, metadata
from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_export import export_rnnt
from onnx_intq.training_loop import Trainer

Command = Callable[..., tuple[int, str, str]]
Run = Callable[..., dict[str, Any]]
SHORT = ("--steps", 6, "--validate-every", 2, "--bits", 2, "--held-out", 0.5)


@pytest.fixture
def run(command: Command) -> Run:
    """Trains, and returns what `--json` says."""

    def train(*arguments: object) -> dict[str, Any]:
        code, out, err = command("train", *arguments, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return train


@pytest.fixture
def rnnt(tmp_path: Path) -> Path:
    """The folder of an RNN-T of the letter a and the space."""
    config = RnntConfig(
        labels=("a", " "), features=4, factor=4, width=8, layers=1, predictor=6, joint=8
    )
    frontend = Frontend(sample_rate=8000, features=4, normalize=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        export_rnnt(Rnnt(config).eval(), tmp_path / "rnnt", frontend=frontend)
    return tmp_path / "rnnt"


def stored(path: Path) -> dict[str, Any]:
    """The integers of a model."""
    tensors = load(path).tensors().items()
    constants = {name: t.values for name, t in tensors if hasattr(t, "values")}
    return {name: values for name, values in constants.items() if values.dtype == np.int8}


@pytest.mark.parametrize("method", ["gq", "s8bqat", "uniform"])
def test_speech_makes_a_model_of_few_bits(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, command: Command, method: str
) -> None:
    output = tmp_path / "q.onnx"
    found = run(tiny, "-o", output, "--manifest", speech, "--method", method, *SHORT)
    assert [step for step, _ in found["history"]] == [0, 2, 4, 6]
    assert found["after"] == min(loss for _, loss in found["history"]) <= found["before"]
    assert found["steps"] == 6
    assert found["share"] == 0.25
    onnx.checker.check_model(str(output))
    integers = stored(output)
    assert len(integers) == 2
    assert all(len(np.unique(values)) <= 4 for values in integers.values())
    known = metadata(load(output))
    assert json.loads(known[BITS_KEY]) == dict.fromkeys(integers, 2)
    assert json.loads(known["onnx_intq.training"])["method"] == method
    assert {"onnx_intq.version", "onnx_intq.source_sha256", "onnx_intq.seed"} <= known.keys()
    code, _, err = command("evaluate", output, "--manifest", speech)
    assert code == 0, err


def test_the_same_command_gives_the_same_bytes(
    tiny: Path, speech: Path, tmp_path: Path, run: Run
) -> None:
    first, second, other = (tmp_path / f"{n}.onnx" for n in range(3))
    arguments = ("--manifest", speech, *SHORT)
    for output in (first, second):
        run(tiny, "-o", output, *arguments)
    run(tiny, "-o", other, *arguments, "--seed", 1)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("method", ["gq", "s8bqat", "uniform"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_training_is_an_uninterrupted_one(
    tiny: Path,
    speech: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    every: int,
) -> None:
    arguments = ("--manifest", speech, *SHORT, "--method", method, "--quantize-every", every)
    whole, part, resumed = (tmp_path / f"{name}.onnx" for name in ("whole", "part", "resumed"))
    run(tiny, "-o", whole, *arguments)
    with monkeypatch.context() as patch:
        clock = iter([0.0, 0.0, 1.0, 2.0, 3.0])
        patch.setattr(training_loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        file = tmp_path / "c.pt"
        found = run(tiny, "-o", part, *arguments, "--checkpoint", file, "--minutes", 0.04)
    assert found["stopped"] == "0.04 minutes were over"
    assert found["steps"] == 3
    assert found["history"][-1][0] == 3
    again = run(tiny, "-o", resumed, *arguments, "--resume", file)
    assert [step for step, _ in again["history"]] == [0, 2, 4, 6]
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_other_options_is_refused(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, command: Command
) -> None:
    output, file = tmp_path / "q.onnx", tmp_path / "c.pt"
    run(tiny, "-o", output, "--manifest", speech, *SHORT, "--checkpoint", file)
    arguments = ("-o", output, "--manifest", speech, *SHORT, "--resume", file, "--rate", 0.5)
    code, _, err = command("train", tiny, *arguments)
    assert code == 2
    assert "was written with rate 0.001, not 0.5; expected the same training" in err


def test_ctrl_c_keeps_the_best_so_far(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, number: int) -> bool:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    found = run(tiny, "-o", tmp_path / "q.onnx", "--manifest", speech, *SHORT)
    assert (found["steps"], found["stopped"]) == (3, "interrupted")
    assert found["best_step"] in {0, 2}
    assert len(stored(tmp_path / "q.onnx")) == 2


def test_numbers_that_overflow_end_the_training(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "_normalized", lambda _gradients: False)
    found = run(tiny, "-o", tmp_path / "q.onnx", "--manifest", speech, *SHORT)
    assert found["stopped"] == "the loss became infinite or NaN at step 1"
    assert found["best_step"] == 0


def test_gradients_are_brought_to_one_size() -> None:
    gradients = [torch.tensor([3.0, -3.0]), torch.zeros(2)]
    assert training_loop._normalized(gradients)
    assert [g.tolist() for g in gradients] == [[1, -1], [0, 0]]
    assert not training_loop._normalized([torch.tensor([torch.nan])])


def test_feeds_are_enough(tiny: Path, tmp_path: Path, run: Run, command: Command) -> None:
    random = np.random.default_rng(0)
    batches = [{"audio_signal": random.standard_normal((4, 4, 30)).astype(np.float32)}] * 2
    feeds.write(tmp_path / "f.npz", batches)
    found = run(tiny, "-o", tmp_path / "q.onnx", "--data", tmp_path / "f.npz", *SHORT)
    assert found["float"] == 0
    assert found["after"] < found["before"]
    assert found["samples"] == found["held_out"] == 4


def test_no_training_gives_uniform_weights(
    tiny: Path, speech: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "q.onnx"
    found = run(tiny, "-o", output, "--manifest", speech, "--method", "none", "--override", "*=2")
    assert found["steps"] == 0
    assert all(set(np.unique(v)) <= {-1, 0, 1} for v in stored(output).values())


def test_a_budget_chooses_the_widths(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, command: Command
) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--manifest", speech, "--budget", 0.5, "--steps", 2)
    found = run(tiny, *arguments)
    assert found["share"] <= 0.5
    assert found["costs"].keys() == found["bits"].keys()
    code, out, _ = command("train", tiny, *arguments)
    assert code == 0
    assert "one bit    next to no loss for 0 of 2 weights\n" in out
    code, _, err = command("train", tiny, *arguments, "--override", "*=8")
    assert code == 2
    assert "cannot be met" in err


def test_an_rnnt_stays_a_folder(
    rnnt: Path, speech: Path, tmp_path: Path, run: Run, command: Command
) -> None:
    output = tmp_path / "out"
    found = run(rnnt, "-o", output, "--manifest", speech, *SHORT)
    assert found["after"] <= found["before"]
    assert {key.partition("/")[0] for key in found["bits"]} == {"encoder", "predictor", "joint"}
    for part in ("encoder", "predictor", "joint"):
        integers = stored(output / f"{part}.onnx")
        assert integers
        assert all(len(np.unique(values)) <= 4 for values in integers.values())
    code, _, err = command("train", rnnt, "-o", rnnt, "--manifest", speech)
    assert code == 2
    assert "output is the input folder" in err


def test_the_report_is_for_people(
    tiny: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("--manifest", speech, *SHORT, "--seconds", 0.52)
    code, out, _ = command("train", tiny, "-o", tmp_path / "q.onnx", *arguments)
    assert code == 0
    assert "1 to train on, 1 held out, 1 left out as too long" in out
    assert "2 weights of 2 bits, 25.0 % of 8 bits each" in out
    assert "never worse than before (float model" in out
    arguments = ("--manifest", speech, *SHORT, "--minutes", 1e-9)
    code, out, _ = command("train", tiny, "-o", tmp_path / "q.onnx", *arguments)
    assert code == 0
    assert "stopped    after 0 steps: 1e-09 minutes were over" in out


def test_cropped_speech_needs_no_transcripts(
    tiny: Path, speech: Path, tmp_path: Path, run: Run
) -> None:
    lines = [json.loads(line) for line in speech.read_text().splitlines()]
    speech.write_text("\n".join(json.dumps(line | {"text": None}) for line in lines))
    arguments = ("--manifest", speech, *SHORT, "--task", 0, "--seconds", 0.3)
    assert run(tiny, "-o", tmp_path / "q.onnx", *arguments)["float"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither --manifest nor --data given"),
        (("--manifest", "SPEECH", "-o", "TINY"), "output is the input file"),
        (("--manifest", "SPEECH", "--checkpoint", "TINY"), "input file; expected another name; ch"),
        (("--manifest", "SPEECH", "--held-out", "0"), "0.0 is not in the range 0<x<=0.9"),
        (("--manifest", "SPEECH", "--resume", "none.pt"), "no such file; expected a checkpoint"),
        (("--manifest", "SPEECH", "--override", "x=3"), "no node matches 'x'"),
        (("--manifest", "SPEECH", "--override", "x=9"), "expected NODES=BITS, 1..8"),
        (("--manifest", "SPEECH", "--task", "0", "--distill", "0"), "expected one of them"),
        (("--manifest", "SPEECH", "--budget", "0.5", "--bits", "3"), "--bits has no effect beside"),
        (("--manifest", "SPEECH", "--method", "none", "--rate", "1"), "--rate has no effect with"),
        (("--data", "SPEECH", "--seconds", "3"), "--seconds has no effect without --manifest"),
        (("--manifest", "SPEECH", "--labels", "LABELS"), "has no labels from 'a a' on"),
        (("--manifest", "SPEECH", "--bits", "9"), "9 is not in the range 1<=x<=8"),
    ],
)
def test_what_users_get_wrong(
    tiny: Path,
    speech: Path,
    tmp_path: Path,
    command: Command,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["b", " "]')
    named = {"SPEECH": str(speech), "TINY": str(tiny), "LABELS": str(labels)}
    given = [named.get(argument, argument) for argument in arguments]
    before = tiny.read_bytes()
    code, _, err = command("train", tiny, "-o", tmp_path / "q.onnx", *given)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert tiny.read_bytes() == before
    assert not (tmp_path / "q.onnx").exists()


def test_models_that_cannot_be_trained(
    tiny: Path, rnnt: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    random = {"audio_signal": np.zeros((1, 4, 9), np.float32)}
    feeds.write(tmp_path / "f.npz", [random])
    code, _, err = command("train", rnnt, "-o", tmp_path / "o", "--data", tmp_path / "f.npz")
    assert code == 2
    assert "feeds, --data, for an RNN-T" in err
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "none.onnx")
    arguments = ("-o", tmp_path / "o.onnx", "--manifest", speech)
    code, _, err = command("train", tmp_path / "none.onnx", *arguments)
    assert code == 2
    assert "holds no weights to quantize" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_absent(
    tiny: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--manifest", speech, "--device", "cuda")
    code, _, err = command("train", tiny, *arguments)
    assert code == 2
    assert "no CUDA device found" in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gq", "s8bqat"])
def test_two_processes_train_like_one(
    tiny: Path, speech: Path, tmp_path: Path, run: Run, method: str
) -> None:
    lines = speech.read_text()
    speech.write_text("\n".join([lines] * 3))
    arguments = ["--manifest", speech, "--steps", 8, "--bits", 3, "--batch-size", 3]
    arguments += ["--method", method, "--validate-every", 4]
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    run(tiny, "-o", one, *arguments)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run(
        [*launch, "-m", "onnx_intq", "train", tiny, "-o", two, *map(str, arguments)],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert stored(one).keys() == stored(two).keys()
    for name, values in stored(one).items():
        assert np.array_equal(values, stored(two)[name])
    for name, tensor in load(one).tensors().items():
        if hasattr(tensor, "values") and tensor.values.dtype == np.float32:
            other = load(two).tensors()[name].values
            np.testing.assert_allclose(tensor.values, other, rtol=1e-5, atol=1e-6)


def test_an_rnnt_reads_transcripts_whatever_the_loss(
    rnnt: Path, speech: Path, tmp_path: Path, run: Run
) -> None:
    arguments = ("--manifest", speech, *SHORT, "--task", 0)
    found = run(rnnt, "-o", tmp_path / "out", *arguments)
    assert found["float"] == 0
    assert 0 <= found["after"] <= found["before"]


def test_products_in_bfloat16(tiny: Path, speech: Path, tmp_path: Path, run: Run) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for output, precision in ((first, "float32"), (second, "bfloat16")):
        run(tiny, "-o", output, "--manifest", speech, *SHORT, "--precision", precision)
    assert first.read_bytes() != second.read_bytes()


def test_quantized_models_are_refused(
    tiny: Path, rnnt: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    assert command("compress", tiny, "-o", tmp_path / "c.onnx", "--bits", 4)[0] == 0
    assert command("compress", rnnt, "-o", tmp_path / "c", "--bits", 4)[0] == 0
    assert command("quantize", tiny, "-o", tmp_path / "d.onnx", "--data", speech)[0] == 0
    for name, message in (
        ("c.onnx", "c.onnx: its weights are integers already; expected a float model; start from"),
        ("c", "encoder.onnx: its weights are integers already; expected a float model"),
        ("d.onnx", "the model is quantized already; expected a float model"),
    ):
        arguments = ("-o", tmp_path / "o", "--manifest", speech)
        code, _, err = command("train", tmp_path / name, *arguments)
        assert (code, err.count("\n"), message in err) == (2, 1, True)
        assert not (tmp_path / "o").exists()


def test_checkpoints_have_a_place_of_their_own(
    tiny: Path, rnnt: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    def refusal(model: Path, output: Path, checkpoint: Path) -> str:
        arguments = ("-o", output, "--manifest", speech, "--checkpoint", checkpoint)
        code, _, err = command("train", model, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        return err

    output, folder = tmp_path / "q.onnx", tmp_path / "q"
    assert "q.onnx: is or lies in the output; expected" in refusal(tiny, output, output)
    assert "change --checkpoint" in refusal(rnnt, folder, folder / "c.pt")
    assert "change --checkpoint" in refusal(tiny, output, speech)
    assert "is a folder; expected the name of a file; change --ch" in refusal(tiny, output, rnnt)
    assert not folder.exists()


def test_transcripts_that_are_missing_are_named(
    tiny: Path, speech: Path, tmp_path: Path, command: Command
) -> None:
    lines = [json.loads(line) for line in speech.read_text().splitlines()]
    speech.write_text("\n".join(json.dumps(line | {"text": None}) for line in lines))
    code, _, err = command("train", tiny, "-o", tmp_path / "q.onnx", "--manifest", speech)
    assert (code, "add it, or train a model that is no RNN-T without, by --task 0" in err) == (2, 1)
