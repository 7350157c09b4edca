"""Small models to build engines of."""

import numpy as np
import onnx

from onnx_intq.frontend import Frontend
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json

HEADER = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]>'
SPEECH = f"""{HEADER}
    g (float[batch, 4, time] audio_signal, int64[batch] length)
    => (float[batch, time, 3] log_probs, int64[batch] encoded)
    <float s = {{0.1}}, int8 z = {{0}}> {{
        [q] a = QuantizeLinear(audio_signal, s, z)
        [dq] b = DequantizeLinear(a, s, z)
        [first] c = Conv(b, w)
        [inner_q] d = QuantizeLinear(c, s, z)
        [inner_dq] e = DequantizeLinear(d, s, z)
        [second] f = Conv(e, w3)
        [third] g = Conv(c, w3)
        [sum] h = Add(f, g)
        [transpose] log_probs = Transpose<perm = [0, 2, 1]>(h)
        [copy] encoded = Identity(length)
    }}"""


def speech_model() -> onnx.ModelProto:
    """Three convolutions, two of which read quantized values, and a front end of 4 mel bands."""
    model = onnx.parser.parse_model(SPEECH)
    w = np.random.default_rng(0).standard_normal((4, 4, 1)).astype(np.float32)
    for name, values in {"w": w, "w3": w[:3]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    frontend = Frontend(sample_rate=8000, features=4)
    recorded = {FRONTEND_KEY: frontend.to_json(), LABELS_KEY: labels_to_json("a ")}
    onnx.helper.set_model_props(model, recorded)
    return model


def one_node(node: str) -> onnx.ModelProto:
    """A model of one node, such as `[name] y = own.Odd(x)`."""
    return onnx.parser.parse_model(f"{HEADER} g (float[4, 4] x) => (float[4, 4] y) {{ {node} }}")
