import json

import numpy as np
import onnx
import pytest

from onnx_intq.frontend import Floats, Frontend
from onnx_intq.lowering import GRIDS_KEY
from onnx_intq.recognizer import Recognizer
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json
from onnx_intq.transform import IntqError

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
ALONE = f"""{HEADER} ctc (float[b, 3, t] audio_signal) => (float[b, t, 3] log_probs) {{
        log_probs = Transpose<perm = [0, 2, 1]>(audio_signal)
    }}"""
HALVED = f"""{HEADER} ctc (float[b, 3, t] audio_signal, int64[b] length)
    => (float[b, f, 3] log_probs)
    <int64[1] zero = {{0}}, int64[1] end = {{1000}}, int64[1] axis = {{2}}, int64[1] two = {{2}}> {{
        half = Slice(audio_signal, zero, end, axis, two)
        log_probs = Transpose<perm = [0, 2, 1]>(half)
    }}"""
ENCODED = f"""{HEADER} ctc (float[b, 3, t] audio_signal, int64[b] length)
    => (float[b, t, 3] log_probs, int64[b] encoded_length) <int64 one = {{1}}> {{
        log_probs = Transpose<perm = [0, 2, 1]>(audio_signal)
        encoded_length = Sub(length, one)
    }}"""
FRONTEND = Frontend(features=3)


def model(text: str = ALONE) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    recorded = {FRONTEND_KEY: FRONTEND.to_json(), LABELS_KEY: labels_to_json("ab")}
    onnx.helper.set_model_props(proto, recorded)
    return proto


def features(path: str) -> Floats:
    """Features whose loudest band per frame spells `path`: a, b or the blank, "-"."""
    return np.eye(3, dtype=np.float32)[["ab-".index(character) for character in path]].T


def test_a_model_says_what_it_hears() -> None:
    recognizer = Recognizer(model(), threads=1)
    assert recognizer.frontend == FRONTEND
    assert recognizer.labels == ("a", "b")
    assert recognizer.transcribe([features("aa-ab"), features("-b")]) == ["aab", "b"]


def test_given_settings_come_before_recorded_ones() -> None:
    given = Frontend(features=3, normalize=None)
    recognizer = Recognizer(model(), frontend=given, labels="xy")
    assert recognizer.frontend == given
    assert recognizer.transcribe([features("ab")]) == ["xy"]


@pytest.mark.parametrize(("text", "heard"), [(HALVED, ["ab", "a", "b"]), (ENCODED, ["a", "", ""])])
def test_padding_is_not_heard(text: str, heard: list[str]) -> None:
    # Padded frames are all zeros, which would be heard as "a".
    recognizer = Recognizer(model(text))
    batch = [features("aabb-") if text == HALVED else features("aa-"), features("a"), features("b")]
    assert recognizer.transcribe(batch) == heard
    assert [recognizer.transcribe([each])[0] for each in batch] == heard


def test_integer_log_probabilities_are_heard() -> None:
    text = f"""{HEADER} ctc (float[b, 3, t] x) => (int8[b, t, 3] y) {{
        a = Transpose<perm = [0, 2, 1]>(x)
        y = Cast<to = 3>(a)
    }}"""
    assert Recognizer(model(text)).transcribe([features("ab")]) == ["ab"]


def test_models_that_take_and_give_integers_are_heard() -> None:
    text = f"""{HEADER} ctc (uint8[b, 3, t] audio_signal) => (uint8[b, t, 3] log_probs) {{
        log_probs = Transpose<perm = [0, 2, 1]>(audio_signal)
    }}"""
    proto = model(text)
    grids = {name: [name, 0.01, 128] for name in ("audio_signal", "log_probs")}
    onnx.helper.set_model_props(
        proto, {p.key: p.value for p in proto.metadata_props} | {GRIDS_KEY: json.dumps(grids)}
    )
    # Without their grid, real values would all be 0 or 1, and the quiet ones the loudest.
    given = [features("aa-ab") - np.float32(1.2), features("-b") - np.float32(1.2)]
    assert Recognizer(proto, threads=1).transcribe(given) == ["aab", "b"]


def test_models_that_record_nothing_need_options() -> None:
    proto = model()
    del proto.metadata_props[:]
    with pytest.raises(IntqError, match=r"does not record its frontend .*; give --frontend"):
        Recognizer(proto, labels="ab")
    with pytest.raises(IntqError, match=r"does not record its labels .*; give --labels"):
        Recognizer(proto, frontend=FRONTEND)


def test_outputs_that_fit_no_labels_are_refused() -> None:
    with pytest.raises(IntqError) as caught:
        Recognizer(model(), labels="abc").transcribe([features("ab")])
    assert "model gives log_probs [1, 2, 3]; expected one output [batch, frames, 4]" in str(
        caught.value
    )


def test_nan_is_refused() -> None:
    with pytest.raises(IntqError, match="model gives NaN as log-probabilities"):
        Recognizer(model()).transcribe([features("ab") * np.float32("nan")])
