"""Peak rates of devices: the table behind `onnx-intq cost --device`, with the source of each row.

GPUs: peak rates of dense products (data sheets that give rates "with sparsity" give twice these),
of tensor cores for TF32, float16 and int8; memory bandwidth without error correction. Left out:
int8 on CUDA cores (DP4A), for which data sheets give no rate; tensor cores are faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_intq.transform import IntqError

PRECISIONS: Mapping[str, int] = {"float32": 4, "float16": 2, "int8": 1}
"""Names of precisions, with the bytes of one value."""
TF32 = "float32 at the rate of TF32, TensorRT's default"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device does at most.

    Attributes:
        name: As `--device` takes it.
        title: For people.
        tops: Precision -> 10^12 operations per second; a multiply-accumulate is two. A precision
            that the device does not compute in is left out.
        gigabytes: 10^9 bytes per second from and to memory.
        source: Where the figures come from.
    """

    name: str
    title: str
    tops: Mapping[str, float]
    gigabytes: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Core:
    """What one core of a CPU does at most in a cycle.

    Attributes:
        macs: Precision -> multiply-accumulates per cycle.
        gigabytes: 10^9 bytes per second of the whole socket's memory.
        source: What is assumed.
    """

    macs: Mapping[str, int]
    gigabytes: float
    source: str


def _gpu(name: str, title: str, rates: tuple[float, ...], gigabytes: float, source: str) -> Device:
    tops = dict(zip(PRECISIONS, rates, strict=True))
    return Device(name=name, title=title, tops=tops, gigabytes=gigabytes, source=source)


GPUS: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu(
            "t4",
            "NVIDIA T4",
            (8.1, 65, 130),
            320,
            "NVIDIA T4 data sheet and Turing architecture white paper (WP-09183-001)",
        ),
        _gpu("a10", "NVIDIA A10", (62.5, 125, 250), 600, f"NVIDIA A10 data sheet; {TF32}"),
        _gpu(
            "l4",
            "NVIDIA L4",
            (60, 121, 242.5),
            300,
            f"NVIDIA L4 data sheet, half of its rates with sparsity; {TF32}",
        ),
        _gpu(
            "a100",
            "NVIDIA A100 40GB",
            (156, 312, 624),
            1555,
            f"NVIDIA A100 data sheet; {TF32}",
        ),
        _gpu(
            "h100",
            "NVIDIA H100 SXM",
            (494.5, 989.5, 1979),
            3350,
            f"NVIDIA H100 data sheet, half of its rates with sparsity; {TF32}",
        ),
        _gpu(
            "h200",
            "NVIDIA H200 SXM",
            (494.5, 989.5, 1979),
            4800,
            f"NVIDIA H200 data sheet, half of its rates with sparsity; {TF32}",
        ),
    )
}
CPUS: Mapping[str, Core] = {
    "cpu-vnni": Core(
        macs={"float32": 32, "int8": 128},
        gigabytes=204.8,
        source="assumed: two 512-bit multipliers per core, as in Intel's Xeons since Ice Lake and "
        "AMD's Zen 5, each with 16 float32 or 64 int8 (VPDPBUSD) multiply-accumulates per cycle; "
        "eight channels of DDR4-3200; no float16 kernels",
    )
}
NAMES = (*GPUS, *CPUS)


def device(name: str, *, cores: int = 1, gigahertz: float = 4.0) -> Device:
    """Look up a device.

    Args:
        name: One of `NAMES`.
        cores: That work; of CPUs only.
        gigahertz: Their highest clock; of CPUs only.

    Raises:
        IntqError: Unknown name; cores or clock not positive.
    """
    if name in GPUS:
        return GPUS[name]
    if name not in CPUS:
        raise IntqError(f"unknown device {name!r}; expected one of: {', '.join(NAMES)}")
    if cores < 1 or not gigahertz > 0:
        raise IntqError(f"{cores} cores at {gigahertz:g} GHz; expected more than 0; change them")
    core = CPUS[name]
    return Device(
        name=name,
        title=f"{name}, {cores} {'core' if cores == 1 else 'cores'} at {gigahertz:g} GHz",
        tops={kind: 2 * macs * cores * gigahertz / 1e3 for kind, macs in core.macs.items()},
        gigabytes=core.gigabytes,
        source=core.source,
    )
