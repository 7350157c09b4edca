"""What one graph of an RNN-T gives, the next takes without rounding; 16 bits where they pay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_intq.calibrate import calibrate
from onnx_intq.graph import load, metadata
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.placement import plan
from onnx_intq.progress import bar
from onnx_intq.recipes import pipeline
from onnx_intq.source import Source
from onnx_intq.transducer_quantize import output_ranges, quantize_folder


@pytest.fixture
def quantized(rnnt: Path, speech: Path) -> Path:
    """The fixture's RNN-T in integers."""
    output = rnnt.with_name("q")
    passes = pipeline("integer", boost=(), scores=("logits",))
    quantize_folder(rnnt, output, lambda _: passes, Source(data=speech), bar=bar)
    return output


def grids(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads(metadata(load(path))[GRIDS_KEY])
    return found


@pytest.mark.slow
def test_grids_meet(quantized: Path) -> None:
    joint = grids(quantized / "joint.onnx")
    for part, name in (("encoder", "encoded"), ("predictor", "predicted")):
        _, scale, zero_point = grids(quantized / f"{part}.onnx")[f"{name}_q"]
        assert joint[f"{name}_q"][1:] == [scale, zero_point]


@pytest.mark.slow
def test_16_bits_where_they_pay(quantized: Path) -> None:
    """Features and what is made of them for the first layer; the joint's scores."""
    types = {name: t.dtype for name, t in load(quantized / "encoder.onnx").tensors().items()}
    assert types["audio_signal_q"] == np.int16
    assert types["encoder.pre_encode.Conv_q"] == np.int16
    assert types["h_q"] == np.uint8
    types = {name: t.dtype for name, t in load(quantized / "joint.onnx").tensors().items()}
    assert types["logits_q"] == np.int16
    assert types["encoded_q"] == np.uint8


@pytest.mark.slow
def test_outputs_of_16_bits_have_no_range(quantized: Path) -> None:
    assert output_ranges(load(quantized / "joint.onnx")) == {}
    found = output_ranges(load(quantized / "encoder.onnx"))
    assert set(found) == {"encoded", "h_out"}  # cells have 16
    low, high = found["encoded"]
    assert -1.1 < low < 0 < high < 1.1


def test_known_ranges_take_the_place_of_what_was_seen(tiny: Path) -> None:
    graph = load(tiny)
    batches = [{"audio_signal": np.random.default_rng(0).normal(size=(1, 4, 9)).astype(np.float32)}]
    seen = calibrate(graph, batches)
    source = Source(fixed={"audio_signal": (-2.0, 7.0)})
    found = source.ranges_of(graph, batches, None, bar)
    assert set(found.tensors["audio_signal"].values()) == {(-2.0, 7.0)}
    assert found.tensors["log_probs"] == seen.tensors["log_probs"]


def test_scores_stay_float(rnnt: Path) -> None:
    graph = load(rnnt / "joint.onnx")
    assert "logits" in plan(graph, "ort").tensors
    assert "logits" not in plan(graph, "ort", scores=("logits",)).tensors
