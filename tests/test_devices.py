import pytest

from onnx_intq.devices import CPUS, GPUS, NAMES, PRECISIONS, device
from onnx_intq.transform import IntqError


@pytest.mark.parametrize("name", NAMES)
def test_narrower_numbers_are_computed_faster(name: str) -> None:
    found = device(name)
    rates = list(found.tops.values())
    assert rates == sorted(rates)
    assert list(found.tops) == [kind for kind in PRECISIONS if kind in found.tops]
    assert found.name == name
    assert found.gigabytes > 0
    assert found.source


@pytest.mark.parametrize("name", GPUS)
def test_tensor_cores_double_their_rate_when_the_width_halves(name: str) -> None:
    tops = device(name).tops
    assert tops["int8"] == pytest.approx(2 * tops["float16"], rel=0.01)
    if name != "t4":  # which has no TF32: float32 is computed on CUDA cores
        assert tops["float16"] == pytest.approx(2 * tops["float32"], rel=0.01)


def test_data_sheets() -> None:
    assert device("t4").tops == {"float32": 8.1, "float16": 65, "int8": 130}
    assert device("h100").tops == device("h200").tops
    assert device("h200").gigabytes / device("h100").gigabytes == pytest.approx(1.43, abs=0.01)


@pytest.mark.parametrize("name", CPUS)
def test_cpus_scale_with_cores_and_clock(name: str) -> None:
    one, four = device(name), device(name, cores=4, gigahertz=2.0)
    assert {kind: rate / 2 for kind, rate in four.tops.items()} == dict(one.tops)
    assert four.gigabytes == one.gigabytes
    assert (one.title, four.title) == (
        f"{name}, 1 core at 4 GHz",
        f"{name}, 4 cores at 2 GHz",
    )


def test_a_vnni_core_multiplies_two_registers_of_64_bytes_in_a_cycle() -> None:
    tops = device("cpu-vnni", gigahertz=1.0).tops
    assert {kind: 1e3 * rate / 2 for kind, rate in tops.items()} == {"float32": 32, "int8": 128}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tpu", {}, "unknown device 'tpu'; expected one of: t4, .*, cpu-vnni"),
        ("cpu-vnni", {"cores": 0}, "0 cores at 4 GHz; expected more than 0; change them"),
        ("cpu-vnni", {"gigahertz": float("nan")}, "1 cores at nan GHz"),
    ],
)
def test_bad_devices_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(IntqError, match=message):
        device(name, **options)
