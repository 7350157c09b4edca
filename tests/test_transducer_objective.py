"""The losses of an RNN-T in three graphs, against its torch modules."""

import pytest
import torch

from onnx_intq.models.rnnt import Rnnt, RnntConfig
from onnx_intq.models.rnnt_graphs import graphs
from onnx_intq.training_data import Batch
from onnx_intq.training_network import TrainedNetwork
from onnx_intq.transducer_loss import transducer_loss
from onnx_intq.transducer_objective import TransducerObjective, require_transducer
from onnx_intq.transform import IntqError

SMALL = RnntConfig(labels=("a", "b"), features=4, factor=2, width=6, layers=2, predictor=5, joint=7)
FRAMES, TARGETS = [8, 5], [[0, 1, 1], [1]]


@pytest.fixture(scope="module")
def rnnt() -> Rnnt:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Rnnt(SMALL).eval()


def batch(extra: int = 0) -> Batch:
    feed = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    feed = torch.nn.functional.pad(feed, (0, extra))
    targets = tuple(map(torch.tensor, TARGETS))
    return Batch(feed={"audio_signal": feed}, frames=torch.tensor(FRAMES), targets=targets)


def objective(network: Rnnt, task: float = 1, distill: float = 1) -> TransducerObjective:
    trained = TrainedNetwork(graphs(network), {}, "cpu")
    return TransducerObjective(network=trained, task=task, distill=distill)


def test_the_lattice_is_that_of_the_modules(rnnt: Rnnt) -> None:
    found = objective(rnnt).lattice(batch(), {})
    assert found.shape == (2, 4, 4, 3)
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    with torch.no_grad():
        encoded, _ = rnnt.encoder(batch().feed["audio_signal"])
        predicted, _ = rnnt.decoder(torch.cat([torch.full((2, 1), 2), labels], 1))
        expected = rnnt.joint(encoded, predicted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [0, 4])
def test_losses_are_per_label_and_padding_does_not_count(rnnt: Rnnt, extra: int) -> None:
    found = objective(rnnt, distill=0)
    losses = found.losses(batch(extra), {})
    lattice = found.lattice(batch(), {})
    sizes = torch.tensor([4, 3]), torch.tensor([3, 1])
    expected = transducer_loss(lattice, torch.tensor([[0, 1, 1], [1, 0, 0]]), *sizes, 2)
    torch.testing.assert_close(losses, expected / sizes[1], rtol=1e-5, atol=1e-5)


def test_distillation_is_zero_for_the_float_model_alone(rnnt: Rnnt) -> None:
    found = objective(rnnt, task=0)
    assert not found.losses(batch(), {}).any()
    places = found.network.weights
    values = {k: torch.from_numpy(0.5 * p.site.constant.values) for k, p in places.items()}
    for value in values.values():
        value.requires_grad_()
    losses = found.losses(batch(), values)
    assert (losses > 0).all()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None for value in values.values())
    both, task = objective(rnnt), objective(rnnt, distill=0)
    total = both.losses(batch(), values) - task.losses(batch(), values)
    torch.testing.assert_close(total, losses, rtol=1e-4, atol=1e-5)


def test_probes_depend_on_what_is_inside_the_lattice(rnnt: Rnnt) -> None:
    found = objective(rnnt)
    key = next(key for key in found.network.weights if key.startswith("joint"))
    site = found.network.weights[key].site
    values = {key: torch.from_numpy(site.constant.values.copy()).requires_grad_()}
    a, b = (
        torch.autograd.grad(found.probe(batch(), values, random), list(values.values()))[0]
        for random in (torch.Generator().manual_seed(seed) for seed in (0, 1))
    )
    assert a.any()
    assert not torch.equal(a, b)


def test_the_joint_must_know_the_labels(rnnt: Rnnt) -> None:
    require_transducer(graphs(rnnt), 2)
    with pytest.raises(IntqError, match=r"joint\.onnx gives 3 classes; expected 5 labels and"):
        require_transducer(graphs(rnnt), 5)
