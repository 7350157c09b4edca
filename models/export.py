"""Writes PyTorch models as clean float ONNX: BatchNorm kept, batch and time dynamic.

Zero-shot calibration reads the statistics BatchNorm holds, so nothing is folded here; the pass
`fold_bn` does that later. Same model, options and versions of torch and onnx: same bytes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

import onnx_intq
from onnx_intq import graph
from onnx_intq.frontend import Frontend
from onnx_intq.models.nemo import load_weights, read_nemo, read_weights
from onnx_intq.models.rnnt import Rnnt
from onnx_intq.models.rnnt_export import export_rnnt
from onnx_intq.models.zoo import PRETRAINED, PUBLISHED, SEED, zoo_model, zoo_names
from onnx_intq.speech import FRONTEND_KEY, LABELS_KEY, labels_to_json
from onnx_intq.transducer_folder import check_folder_output, is_folder
from onnx_intq.transform import IntqError

__all__ = ["OPSETS", "export", "export_named", "zoo_names"]

OPSETS = range(17, 24)
"""Opsets from the oldest of our dialects to the newest tried."""
NEWEST_TRACED = 20
"""Newest opset torch's tracing exporter writes; later ones are converted to."""
EXAMPLE_FRAMES = 64
"""Frames of the input the network is traced with; the file takes any number."""
COMPUTED = "onnx::"
"""What the exporter's names for constants that it has computed begin with."""


def export_named(
    source: str,
    path: str | Path,
    *,
    weights: str | Path | None = None,
    opset: int = 17,
    lengths: bool = False,
) -> None:
    """Export a model of the zoo or a `.nemo` file.

    Args:
        source: One of `zoo_names()`, or the path of a file that ends in `.nemo`.
        path: Where to write the ONNX file; of an RNN-T the folder of its three.
        weights: A PyTorch state dict to load in place of the model's own weights.
        opset: As for `export`.
        lengths: As for `export`.

    Raises:
        IntqError: The name is unknown, a file is invalid, weights do not fit, `lengths` is asked of
            an RNN-T, its path ends in `.onnx` or is a folder of other things, or as for `export`.
    """
    is_file = source.endswith(".nemo")
    inputs = (source if is_file else None, weights)
    if not is_folder(path):
        graph.check_output(path, *inputs)
    _check_opset(opset)
    model = read_nemo(source) if is_file else zoo_model(source)
    if weights is not None:
        load_weights(model.network, read_weights(weights))
    if isinstance(model.network, Rnnt):
        _check_rnnt(path, lengths, *inputs)
        origin = _origin(source, weights)
        export_rnnt(model.network, path, frontend=model.frontend, opset=opset, origin=origin)
        return
    graph.check_output(path, *inputs)
    export(
        model.network,
        path,
        frontend=model.frontend,
        labels=model.network.config.labels,
        opset=opset,
        lengths=lengths,
        origin=_origin(source, weights),
    )


def export(
    module: nn.Module,
    path: str | Path,
    *,
    frontend: Frontend,
    labels: Sequence[str],
    opset: int = 17,
    lengths: bool = False,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write `module`, which maps features to CTC log-probabilities, to `path`, whole or not at all.

    Inputs and outputs of the file: `audio_signal` float32 [batch, features, time] and `log_probs`
    float32 [batch, frames, labels + 1]; with `lengths` also `length` and `encoded_length`, int64
    [batch]: the module's second argument and second result.

    Args:
        module: Exported in evaluation mode; left in the mode it was in.
        path: Where to write the ONNX file.
        frontend: What the features are made with, for the metadata.
        labels: The labels without the blank, for the metadata.
        opset: One of `OPSETS`.
        lengths: Add the length input and the masks that go with it.
        origin: More metadata, such as `onnx_intq.source_sha256`.

    Raises:
        IntqError: The opset is not supported or the file cannot be written.
    """
    _check_opset(opset)
    traced = min(opset, NEWEST_TRACED)
    model = graph.graph_from_model(_trace(module, frontend.features, traced, lengths))
    _own_copies(model)
    _name_results(model)
    _name_constants(model)
    graph.convert_opset(model, opset)
    graph.metadata(model).update(
        {
            "onnx_intq.version": onnx_intq.__version__,
            FRONTEND_KEY: frontend.to_json(),
            LABELS_KEY: labels_to_json(labels),
            **(origin or {}),
        }
    )
    graph.save(model, path)


def _check_rnnt(path: str | Path, lengths: bool, *inputs: str | Path | None) -> None:
    if lengths:
        raise IntqError(
            "an RNN-T's frames depend on no later ones; expected no length input; "
            "leave out --lengths"
        )
    check_folder_output(path, *inputs)


def _check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise IntqError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}; change --opset")


def _origin(source: str, weights: str | Path | None) -> dict[str, str]:
    if weights is not None:
        return {"onnx_intq.source_sha256": graph.sha256(weights)}
    if source in PUBLISHED:
        return {"onnx_intq.seed": str(SEED)}
    file = source if source.endswith(".nemo") else PRETRAINED / f"{source}.nemo"
    return {"onnx_intq.source_sha256": graph.sha256(file)}


def _trace(module: nn.Module, features: int, opset: int, lengths: bool) -> onnx.ModelProto:
    inputs = {
        "audio_signal": torch.zeros(1, features, EXAMPLE_FRAMES),
        "length": torch.tensor([EXAMPLE_FRAMES]),
    }
    axes = {"audio_signal": {0: "batch", 2: "time"}, "log_probs": {0: "batch", 1: "frames"}}
    axes |= {"length": {0: "batch"}, "encoded_length": {0: "batch"}}
    names, results = (list(inputs), ["log_probs", "encoded_length"])
    used = slice(None if lengths else 1)
    with _evaluation(module), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The new exporter needs another package and takes BatchNorm apart; and constants that
        # are folded here are those of shape arithmetic only.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "It is recommended that constant folding be turned off")
        # Shapes are written as operators; their values while tracing serve the example alone.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        target = Path(folder) / "traced.onnx"
        torch.onnx.export(
            module,
            tuple(inputs.values())[used],
            str(target),
            dynamo=False,
            opset_version=opset,
            # EVAL would fold BatchNorm into the convolutions.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=True,
            input_names=names[used],
            output_names=results[used],
            dynamic_axes={name: axes[name] for name in (*names[used], *results[used])},
        )
        return onnx.load(target)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def _own_copies(model: gs.Graph) -> None:
    """Give every parameter its own values where the exporter merged equal ones by Identity."""
    merged = [
        node
        for node in model.nodes
        if node.op == "Identity" and isinstance(node.inputs[0], gs.Constant)
    ]
    for node in merged:
        (shared,), (output,) = node.inputs, node.outputs
        node.outputs.clear()
        output.to_constant(shared.values.copy())
    graph.remove(model, merged)


def _name_results(model: gs.Graph) -> None:
    """Name tensors after the modules that compute them: short, and alike in every export.

    Of several operators of one module, the first has its name; if no other module is inside it,
    the last, which gives the module's result.
    """
    paths = [node.name.strip("/").replace("/", ".") for node in model.nodes]
    modules = [path.rpartition(".")[0] for path in paths]
    around = {module.rpartition(".")[0] for module in modules}
    last = {module: index for index, module in enumerate(modules)}
    taken = set(model.tensors())
    outputs = {id(tensor) for tensor in model.outputs}
    for index, (node, path, module) in enumerate(zip(model.nodes, paths, modules, strict=True)):
        named = module in around or last[module] == index
        for tensor in node.outputs:
            name = module if module and module not in taken and named else path
            if id(tensor) not in outputs and name not in taken:
                tensor.name = name
                taken.add(name)


def _name_constants(model: gs.Graph) -> None:
    """Name the constants that the exporter has computed after what reads them first.

    Such are the weights of linear layers, which it transposes.
    """
    taken = set(model.tensors())
    for node in model.nodes:
        path = node.name.strip("/").replace("/", ".")
        weight = f"{path.rpartition('.')[0]}.weight"
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name.startswith(COMPUTED):
                is_weight = node.op == "MatMul" and weight not in taken
                tensor.name = weight if is_weight else f"{path}.constant"
                taken.add(tensor.name)
