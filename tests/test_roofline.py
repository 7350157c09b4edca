from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_intq.cost import Cost, NodeCost, cost
from onnx_intq.devices import GPUS, NAMES, PRECISIONS, Device, device
from onnx_intq.graph import load
from onnx_intq.models.export import export_named
from onnx_intq.roofline import Roofline, own_precision, roofline

SIZES = st.integers(1, 10**9)
NODES = st.lists(
    st.builds(
        NodeCost,
        name=st.just("n"),
        op=st.just("Conv"),
        macs=st.integers(1, 10**12),
        bits=st.sampled_from([(8, 8), (32, 32), (16, 16), (8, 16), (32, 4), (6, 8)]),
        elements=st.tuples(SIZES, SIZES, SIZES),
    ),
    min_size=1,
    max_size=5,
)
NAMED = st.sampled_from(NAMES).map(device)


def model(*nodes: NodeCost) -> Cost:
    return Cost(parameters=0, weight_bytes=0, inputs={}, nodes=nodes, uncounted=())


def product(macs: int, elements: tuple[int, int, int], bits: tuple[int, int] = (8, 8)) -> NodeCost:
    return NodeCost(name="c", op="Conv", macs=macs, bits=bits, elements=elements)


TOY = Device(
    name="toy",
    title="Toy",
    tops={"float32": 1e-12, "float16": 2e-12, "int8": 8e-12},
    gigabytes=4e-9,
    source="a thought",
)
"""1, 2 and 8 operations per second; 4 bytes per second."""


def test_a_product_by_hand() -> None:
    found = roofline(model(product(4, (2, 3, 4), bits=(32, 32))), TOY)
    seconds = {kind: each.seconds for kind, each in found.bounds.items()}
    # 8 operations at 1, 2 and 8 per second; 9 values of 4, 2 and 1 bytes at 4 per second.
    assert seconds == pytest.approx({"float32": 9, "float16": 4.5, "int8": 2.25})
    assert {kind: each.layers[0].bound for kind, each in found.bounds.items()} == dict.fromkeys(
        PRECISIONS, "memory"
    )
    assert found.own == found.bounds["float32"]
    (layer,) = found.bounds["int8"].layers
    assert (layer.bytes, layer.compute, layer.memory) == pytest.approx((9, 1, 2.25))
    assert found.speedup(found.bounds["int8"]) == pytest.approx(4)


def test_what_binds_depends_on_the_precision() -> None:
    dense, thin = product(40, (1, 1, 2)), product(1, (100, 50, 50))
    found = roofline(model(dense, thin), TOY)
    assert [layer.bound for layer in found.own.layers] == ["compute", "memory"]
    int8 = found.bounds["int8"]
    assert (int8.memory_layers, int8.memory_time) == pytest.approx((0.5, 50 / 60))
    assert int8.seconds == pytest.approx(10 + 50)


@given(NODES, NAMED)
def test_the_bound_is_at_least_that_of_compute_and_that_of_memory(
    nodes: list[NodeCost], chosen: Device
) -> None:
    for kind, each in roofline(model(*nodes), chosen).bounds.items():
        rate, width = chosen.tops[kind] * 1e12 / 2, PRECISIONS[kind]
        macs, values = sum(n.macs for n in nodes), sum(sum(n.elements) for n in nodes)
        least = (macs / rate, values * width / (chosen.gigabytes * 1e9))
        assert each.seconds >= max(least) * (1 - 1e-12)
        assert each.seconds <= sum(least) * (1 + 1e-12)
        assert 0 <= each.memory_layers <= 1
        assert 0 <= each.memory_time <= 1


@given(NODES, NODES, NAMED)
def test_bounds_of_two_models_add_up(
    first: list[NodeCost], second: list[NodeCost], chosen: Device
) -> None:
    parts = [roofline(model(*nodes), chosen).own.seconds for nodes in (first, second)]
    assert roofline(model(*first, *second), chosen).own.seconds == pytest.approx(sum(parts))


@given(NODES, NAMED)
def test_narrower_is_not_slower(nodes: list[NodeCost], chosen: Device) -> None:
    found = roofline(model(*nodes), chosen)
    seconds = [each.seconds for each in found.bounds.values()]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] <= found.own.seconds <= seconds[0]


@given(NODES, st.sampled_from(list(GPUS)).map(device))
def test_twice_the_device_takes_half_the_time(nodes: list[NodeCost], chosen: Device) -> None:
    twice = replace(
        chosen,
        tops={kind: 2 * rate for kind, rate in chosen.tops.items()},
        gigabytes=2 * chosen.gigabytes,
    )
    once = roofline(model(*nodes), chosen).own.seconds
    assert roofline(model(*nodes), twice).own.seconds == pytest.approx(once / 2)


@pytest.mark.parametrize(
    ("bits", "gpu", "cpu"),
    [
        ((8, 8), "int8", "int8"),
        ((8, 4), "int8", "int8"),
        ((16, 16), "float16", "float32"),
        ((16, 8), "float32", "float32"),
        ((32, 8), "float32", "float32"),
        ((32, 32), "float32", "float32"),
    ],
)
def test_the_precision_of_a_stored_product(bits: tuple[int, int], gpu: str, cpu: str) -> None:
    node = product(1, (1, 1, 1), bits)
    assert own_precision(node, device("t4")) == gpu
    assert own_precision(node, device("cpu-vnni")) == cpu


def test_a_model_without_products_takes_no_time() -> None:
    found = roofline(model(), TOY)
    assert found.own.seconds == found.own.memory_layers == found.own.memory_time == 0
    assert found.speedup(found.own) == 1


@pytest.fixture(scope="module")
def quartznet(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Roofline]:
    """The real QuartzNet15x5 on a T4, by batch."""
    path = tmp_path_factory.mktemp("roofline") / "float.onnx"
    export_named(str(assets / "quartznet15x5.nemo"), path)
    graph = load(path)
    return {batch: roofline(cost(graph, batch=batch), device("t4")) for batch in (1, 8)}


@pytest.mark.slow
def test_the_published_speedup_lies_within_the_bounds(quartznet: dict[int, Roofline]) -> None:
    found = quartznet[1]
    assert len(found.own.layers) == 171
    # Q-ASR, section 3.2: int8 over float32 for 10 s of audio on a T4.
    assert found.speedup(found.bounds["int8"]) > 2.35
    # 9.42 GMACs at 8.1 TFLOPS take 2.33 ms, and so does the model at the least.
    assert found.own.seconds > 2 * 9.42e9 / 8.1e12


@pytest.mark.slow
def test_a_batch_reads_the_weights_once(quartznet: dict[int, Roofline]) -> None:
    for kind in PRECISIONS:
        one, eight = (quartznet[batch].bounds[kind] for batch in (1, 8))
        assert one.seconds < eight.seconds < 8 * one.seconds
        assert eight.memory_time <= one.memory_time
