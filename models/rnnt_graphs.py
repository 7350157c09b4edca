"""Writes an RNN-T as three ONNX graphs of standard operators, states as inputs and outputs.

The graphs are made by hand rather than traced: what they are to look like is known, and a tracer
writes shape arithmetic around each LSTM. Same network: same bytes.

    encoder: audio_signal [batch, mels, time], h, c -> encoded [batch, frames, width], h_out, c_out
    predictor: label int64 [batch, 1], h, c -> predicted [batch, 1, width], h_out, c_out
    joint: encoded [batch, T, width], predicted [batch, U, width] -> logits [batch, T, U, labels+1]

States are float32 [layers, batch, width], zero at the start. Stacking k frames and a linear layer
are one convolution of kernel and stride k, which takes any number of frames: zeros fill up the last
stack, as in NeMo.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, nn

from onnx_intq import graph
from onnx_intq.models.rnnt import Rnnt

Floats = npt.NDArray[np.float32]
OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
"""Of each of `rnnt_joint.ACTIVATIONS`."""
GATES = (0, 3, 1, 2)
"""PyTorch's gates in ONNX's order: input, output, forget, cell."""


def graphs(network: Rnnt, opset: int = 17) -> dict[str, gs.Graph]:
    """The graphs by their names: encoder, predictor, joint.

    Args:
        network: Taken as in evaluation mode.
        opset: Of the graphs.
    """
    written = {"encoder": _encoder, "predictor": _predictor, "joint": _joint}
    found: dict[str, gs.Graph] = {}
    for name, write in written.items():
        builder = _Builder(name)
        write(builder, network)
        found[name] = builder.graph
        graph.convert_opset(found[name], opset)
    return found


class _Builder:
    """A graph that grows node by node; nodes and tensors are named after the modules."""

    def __init__(self, name: str) -> None:
        self.graph = gs.Graph(name=name, opset=17)

    def input(self, name: str, *shape: int | str, dtype: npt.DTypeLike = np.float32) -> gs.Variable:
        self.graph.inputs.append(gs.Variable(name, np.dtype(dtype), shape))
        return self.graph.inputs[-1]

    def output(self, tensor: gs.Variable, name: str, *shape: int | str) -> None:
        tensor.name, tensor.dtype, tensor.shape = name, np.dtype(np.float32), list(shape)
        self.graph.outputs.append(tensor)

    def node(
        self, op: str, path: str, *inputs: gs.Tensor, results: int = 1, **attrs: Any
    ) -> list[gs.Variable]:
        """Add an operator of the module `path`; its result is named after both."""
        suffixes = [""] if results == 1 else [f".{number}" for number in range(results)]
        outputs = [gs.Variable(f"{path}.{op}{suffix}") for suffix in suffixes]
        name = f"/{path.replace('.', '/')}/{op}"
        self.graph.nodes.append(gs.Node(op, name, attrs, list(inputs), outputs))
        return outputs

    def linear(self, path: str, layer: nn.Linear, signal: gs.Tensor) -> gs.Variable:
        weight = gs.Constant(f"{path}.weight", _values(layer.weight.T))
        (product,) = self.node("MatMul", path, signal, weight)
        (result,) = self.node("Add", path, product, _constant(f"{path}.bias", layer.bias))
        return result

    def lstm(
        self, path: str, lstm: nn.LSTM, layer: int, signal: gs.Tensor, h: gs.Tensor, c: gs.Tensor
    ) -> list[gs.Variable]:
        """One layer: [time, batch, inputs] and its states to [time, batch, width] and states."""

        def values(name: str) -> Floats:
            return _reordered(getattr(lstm, f"{name}_l{layer}"))

        bias = values("bias_ih") + values("bias_hh")
        weights = {
            "W": values("weight_ih"),
            "R": values("weight_hh"),
            "B": np.concatenate([bias, np.zeros_like(bias)]),
        }
        w, r, b = (gs.Constant(f"{path}.{key}", each[np.newaxis]) for key, each in weights.items())
        none = gs.Variable.empty()
        size = {"hidden_size": lstm.hidden_size}
        y, h, c = self.node("LSTM", path, signal, w, r, b, none, h, c, results=3, **size)
        (hidden,) = self.node("Squeeze", path, y, _axes(path, 1))
        return [hidden, h, c]


def _encoder(builder: _Builder, network: Rnnt) -> None:
    config, encoder = network.config, network.encoder
    signal = builder.input("audio_signal", "batch", config.features, "time")
    states = [builder.input(name, config.layers, "batch", config.width) for name in ("h", "c")]
    layer = encoder.pre_encode.proj_out
    stacks = layer.weight.reshape(config.width, config.factor, config.features).transpose(1, 2)
    path = "encoder.pre_encode"
    (stacked,) = builder.node(
        "Conv",
        path,
        signal,
        _constant(f"{path}.weight", stacks),
        _constant(f"{path}.bias", layer.bias),
        kernel_shape=[config.factor],
        strides=[config.factor],
        pads=[0, config.factor - 1],
    )
    (hidden,) = builder.node("Transpose", path, stacked, perm=[2, 0, 1])
    layers = [(f"encoder.layers.{n}", lstm, 0) for n, lstm in enumerate(encoder.lstms)]
    shape = ("batch", "frames", config.width)
    _recurrent(builder, "encoder", layers, hidden, states, result=("encoded", shape))


def _predictor(builder: _Builder, network: Rnnt) -> None:
    config, prediction = network.config, network.decoder.prediction
    label = builder.input("label", "batch", 1, dtype=np.int64)
    shape = (config.predictor_layers, "batch", config.predictor)
    states = [builder.input(name, *shape) for name in ("h", "c")]
    path = "predictor.embed"
    table = _constant(f"{path}.weight", prediction.embed.weight)
    (embedded,) = builder.node("Gather", path, table, label, axis=0)
    (hidden,) = builder.node("Transpose", path, embedded, perm=[1, 0, 2])
    lstm = prediction.dec_rnn.lstm
    layers = [(f"predictor.layers.{n}", lstm, n) for n in range(config.predictor_layers)]
    result = ("predicted", ("batch", 1, config.predictor))
    _recurrent(builder, "predictor", layers, hidden, states, result=result)


def _recurrent(
    builder: _Builder,
    path: str,
    layers: list[tuple[str, nn.LSTM, int]],
    hidden: gs.Tensor,
    states: list[gs.Variable],
    *,
    result: tuple[str, tuple[int | str, ...]],
) -> None:
    """The layers in a row; the outputs: `result`, [batch, time, width], and their states."""
    before = [_split(builder, f"{path}.{state.name}", state, len(layers)) for state in states]
    after: list[tuple[gs.Variable, gs.Variable]] = []
    for (name, lstm, number), h, c in zip(layers, *before, strict=True):
        hidden, *ended = builder.lstm(name, lstm, number, hidden, h, c)
        after.append((ended[0], ended[1]))
    (last,) = builder.node("Transpose", path, hidden, perm=[1, 0, 2])
    builder.output(last, result[0], *result[1])
    for state, ends in zip(states, zip(*after, strict=True), strict=True):
        name, shape = f"{state.name}_out", state.shape
        builder.output(_joined(builder, f"{path}.{name}", ends), name, *shape)


def _split(builder: _Builder, path: str, state: gs.Tensor, layers: int) -> list[gs.Tensor]:
    if layers == 1:
        return [state]
    sizes = gs.Constant(f"{path}.sizes", np.ones(layers, np.int64))
    return [*builder.node("Split", path, state, sizes, results=layers, axis=0)]


def _joined(builder: _Builder, path: str, ends: tuple[gs.Variable, ...]) -> gs.Variable:
    return ends[0] if len(ends) == 1 else builder.node("Concat", path, *ends, axis=0)[0]


def _joint(builder: _Builder, network: Rnnt) -> None:
    config, joint = network.config, network.joint
    encoded = builder.input("encoded", "batch", "T", config.width)
    predicted = builder.input("predicted", "batch", "U", config.predictor)
    operands = []
    for axis, name, layer, signal in (
        (2, "joint.enc", joint.enc, encoded),
        (1, "joint.pred", joint.pred, predicted),
    ):
        projected = builder.linear(name, layer, signal)
        operands += builder.node("Unsqueeze", name, projected, _axes(name, axis))
    (summed,) = builder.node("Add", "joint", *operands)
    (hidden,) = builder.node(OPERATORS[config.activation], "joint.joint_net", summed)
    logits = builder.linear("joint.joint_net", joint.last, hidden)
    builder.output(logits, "logits", "batch", "T", "U", len(config.labels) + 1)


def _reordered(parameter: Tensor) -> Floats:
    """Rows of four gates, in ONNX's order."""
    return _values(torch.cat([parameter.chunk(4)[gate] for gate in GATES]))


def _constant(name: str, parameter: Tensor) -> gs.Constant:
    return gs.Constant(name, _values(parameter))


def _axes(path: str, axis: int) -> gs.Constant:
    return gs.Constant(f"{path}.axes", np.array([axis], np.int64))


def _values(parameter: Tensor) -> Floats:
    return np.ascontiguousarray(parameter.detach().cpu().numpy(), np.float32)
