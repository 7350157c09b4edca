"""CTC and distillation."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onnx_intq.graph import graph_from_model
from onnx_intq.quantize import prepared
from onnx_intq.training_data import Batch
from onnx_intq.training_loss import (
    GraphObjective,
    Head,
    divergence,
    heads,
    inner_tensors,
    lengths_output,
    relative_error,
    require_ctc,
    signed,
)
from onnx_intq.training_network import TrainedNetwork
from onnx_intq.transform import IntqError

BOUND: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def graph(body: str, outputs: str = "float[n, t, 3] y") -> gs.Graph:
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    model = onnx.parser.parse_model(f"{header} g (float[n, t, 3] x) => ({outputs}) {{ {body} }}")
    return graph_from_model(model)


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("y = LogSoftmax(x)", Head(tensor="x", axis=-1)),
        ("a = Relu(x) y = Softmax<axis = 1>(a)", Head(tensor="a", axis=1)),
        ("a = LogSoftmax<axis = 2>(x) y = Identity(a)", Head(tensor="x", axis=2)),
        ("a = Softmax(x) y = Log(a)", Head(tensor="x", axis=-1)),
        ("y = Relu(x)", Head(tensor="y", axis=None)),
        ("y = Identity(x)", Head(tensor="y", axis=None)),
    ],
)
def test_results_are_compared_before_the_softmax(body: str, head: Head) -> None:
    assert heads(graph(body)) == [head]


def test_integers_are_no_results_but_lengths() -> None:
    both = graph("y = Relu(x) s = Shape<end = 1>(x)", "float[n, t, 3] y, int64[n] s")
    assert heads(both) == [Head(tensor="y", axis=None)]
    assert lengths_output(both) == "s"
    assert lengths_output(graph("y = Relu(x)")) is None
    with pytest.raises(IntqError, match="no float32 output"):
        heads(graph("s = Shape(x)", "int64[3] s"))


def test_inner_tensors_are_spread_evenly() -> None:
    nodes = [gs.Node("Relu", f"n{i}", {}, [], [gs.Variable(f"t{i}")]) for i in range(9)]
    chain = gs.Graph(nodes=nodes)
    assert inner_tensors(chain, [n.name for n in nodes]) == ["t2", "t4", "t6"]
    assert inner_tensors(chain, ["n0", "n1"]) == []


@given(st.integers(0, 100))
def test_the_divergence_is_that_of_distributions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, 3, 4, 5, generator=generator)
    found = divergence(s, t, None)
    kl = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), log_target=True, reduction="none")
    torch.testing.assert_close(found, kl.sum(-1).mean(1), **BOUND)
    valid = torch.arange(4) < torch.tensor([[4], [2], [0]])
    some = divergence(s, t, valid)
    torch.testing.assert_close(some[1], kl[1, :2].sum(-1).mean(), **BOUND)
    assert some[2] == 0
    assert not divergence(t, t, None).any()


def test_the_relative_error_has_no_unit() -> None:
    s, t = torch.randn(2, 3, 4)
    torch.testing.assert_close(relative_error(s * 7, t * 7), relative_error(s, t), **BOUND)
    assert not relative_error(t, t).any()


def batch(frames: list[int], targets: list[list[int]], *, mels: int = 4) -> Batch:
    feed = torch.randn(len(frames), mels, max(frames), generator=torch.Generator().manual_seed(0))
    return Batch(
        feed={"audio_signal": feed},
        frames=torch.tensor(frames),
        targets=tuple(torch.tensor(each, dtype=torch.int64) for each in targets),
    )


def objective(path: Path, *, task: float = 1, distill: float = 1, inner: int = 0) -> GraphObjective:
    model = prepared(path)
    found = heads(model)
    taps = [node.outputs[0].name for node in model.nodes[:inner]]
    network = TrainedNetwork({"model": model}, {"model": [*taps, found[0].tensor]}, "cpu")
    return GraphObjective(network=network, heads=found, task=task, distill=distill, inner=taps)


def changed(found: GraphObjective) -> dict[str, Tensor]:
    """Other weights than the model's own."""
    sites = {key: place.site.constant.values for key, place in found.network.weights.items()}
    return {k: torch.from_numpy(0.5 * v).requires_grad_() for k, v in sites.items()}


def test_ctc_is_torchs_over_valid_frames(tiny: Path) -> None:
    found = objective(tiny, distill=0)
    data = batch([9, 5], [[0, 1], [0]])
    losses = found.losses(data, {})
    log_probs = found.network.run("model", data.feed, {})["log_probs"]
    for row, (frames, target) in enumerate(((9, [0, 1]), (5, [0]))):
        expected = F.ctc_loss(
            log_probs[row, :frames, None],
            torch.tensor(target),
            torch.tensor([frames]),
            torch.tensor([len(target)]),
            blank=2,
            reduction="sum",
        )
        torch.testing.assert_close(losses[row], expected / len(target), **BOUND)


def test_a_transcript_longer_than_the_audio_counts_nothing(tiny: Path) -> None:
    losses = objective(tiny, distill=0).losses(batch([2, 9], [[0, 1, 0], [0]]), {})
    assert losses[0] == 0 < losses[1]


@pytest.mark.parametrize("inner", [0, 2])
def test_distillation_is_zero_for_the_float_model_alone(tiny: Path, inner: int) -> None:
    found = objective(tiny, task=0, inner=inner)
    data = batch([9, 5], [])
    assert not found.losses(data, {}).any()
    values = changed(found)
    losses = found.losses(data, values)
    assert (losses > 0).all()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert all(v.grad is not None and v.grad.any() for v in values.values())


def test_padding_is_not_compared(tiny: Path) -> None:
    """A frame beyond the end of an utterance, but for the reach of the convolution."""
    found = objective(tiny, task=0)
    short, padded = batch([5], []), batch([5], [])
    feed = F.pad(short.feed["audio_signal"], (0, 4))
    padded = Batch(feed={"audio_signal": feed}, frames=padded.frames, targets=())
    values = changed(found)
    # As many frames come out as go in, so the stride is 1 in both; only the first 5 count.
    a, b = (found.losses(each, values) for each in (short, padded))
    torch.testing.assert_close(a, b, **BOUND)


def test_both_losses_add_up(tiny: Path) -> None:
    parts = [objective(tiny, task=t, distill=d) for t, d in ((2, 3), (2, 0), (0, 3))]
    data, values = batch([9, 5], [[0], [1]]), changed(parts[0])
    both, ctc, distance = (part.losses(data, values) for part in parts)
    torch.testing.assert_close(both, ctc + distance, **BOUND)


def test_results_without_classes_are_compared_by_their_power() -> None:
    model = graph(
        "a = MatMul(x, w) y = Relu(a) z = Softmax<axis = 1>(a)", "float[n,t,3] y, float[n,t,3] z"
    )
    model.tensors()["w"].to_constant(np.eye(3, dtype=np.float32))
    found = heads(model)
    taps = {"model": [head.tensor for head in found]}
    network = TrainedNetwork({"model": model}, taps, "cpu")
    both = GraphObjective(network=network, heads=found, task=0, distill=1)
    data = Batch(feed={"x": torch.randn(2, 4, 3)}, frames=torch.tensor([3, 3]), targets=())
    losses = both.losses(data, {"model/w": torch.eye(3) * 2})
    assert (losses >= 1).all()  # twice the value has the power of the value as its error


def test_lengths_come_from_the_model_where_it_gives_them() -> None:
    model = graph("y = LogSoftmax(x) s = Shape<start = 2>(x)", "float[n, t, 3] y, int64[1] s")
    network = TrainedNetwork({"model": model}, {"model": ["x"]}, "cpu")
    found = GraphObjective(network=network, heads=heads(model), task=0, distill=1, lengths="s")
    data = Batch(feed={"x": torch.randn(1, 5, 3)}, frames=torch.tensor([5]), targets=())
    s, t = {"x": data.feed["x"] * 2}, data.feed
    expected = divergence(s["x"][:, :3], t["x"][:, :3], None)
    mask = torch.arange(5)[None] < 3
    torch.testing.assert_close(divergence(s["x"], t["x"], mask), expected, **BOUND)
    assert found.losses(data, {}).tolist() == [0]


def test_models_without_ctc_are_refused(tiny: Path) -> None:
    require_ctc(prepared(tiny), heads(prepared(tiny)), "a ")
    with pytest.raises(IntqError, match=r"expected one float output \[batch, frames, 5\]"):
        require_ctc(prepared(tiny), heads(prepared(tiny)), "abc ")
    for body in ("y = Relu(x)", "y = Softmax<axis = 1>(x)"):
        with pytest.raises(IntqError, match="behind LogSoftmax, for CTC"):
            require_ctc(graph(body), heads(graph(body)), "ab")


def test_probes_tell_what_small_changes_cost(tiny: Path) -> None:
    found = objective(tiny, task=0)
    data, own = batch([30, 17], []), changed(found)
    values = {key: (2 * v).detach().requires_grad_() for key, v in own.items()}
    random = torch.Generator().manual_seed(0)
    change = {k: 0.02 * torch.randn(v.shape, generator=random) for k, v in values.items()}
    moved = {key: v.detach() + change[key] for key, v in values.items()}
    squares = []
    for _ in range(600):
        probe = found.probe(data, values, random)
        gradients = torch.autograd.grad(probe, list(values.values()))
        along = sum((g * c).sum() for g, c in zip(gradients, change.values(), strict=True))
        squares.append(float(along) ** 2)
    cost = float(found.losses(data, moved).mean())
    assert np.mean(squares) == pytest.approx(cost, rel=0.25)


def test_the_probe_of_an_error_is_exact_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, generator=random)
    step = torch.randn(2, 40, generator=random)
    squares = []
    for _ in range(600):
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(signed(at, random), [at])
        squares.append(float((gradient * step).sum()) ** 2)
    cost = float(relative_error(x + step, x).mean())
    assert np.mean(squares) == pytest.approx(cost, rel=0.25)
