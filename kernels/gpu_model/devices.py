"""GPUs that the cost model knows: some from what NVIDIA publishes, its other GPUs from what torch reports.

| device | bf16, fp16 | fp32 | memory | L2 cache | source |
| --- | --- | --- | --- | --- | --- |
| H100 SXM5 80 GB | 989 TFLOP/s | 67 TFLOP/s | 3.35 TB/s | 50 MB, 9.0 TB/s | data sheet; cache: see below |
| H200 SXM5 141 GB | 989 TFLOP/s | 67 TFLOP/s | 4.8 TB/s | 50 MB, 9.0 TB/s | data sheet; cache as the H100 |
| A100 SXM4 80 GB | 312 TFLOP/s | 19.5 TFLOP/s | 2.039 TB/s | 40 MB, 7.2 TB/s | data sheet; cache: white paper |

Data sheets give twice the bf16 rate for 2:4 sparse weights; the table has the dense rate. The A100's white paper gives
5,120 bytes a clock for reads of L2, at 1.41 GHz. The H100's gives only the size, so the H100 is given the same number
of bytes at 1.755 GHz.

For other NVIDIA GPUs torch reports multiprocessors, clocks and the width of the memory bus. How much a multiprocessor
computes in a clock depends on the compute capability (FLOP, dense, summed up in fp32):

| capability | bf16, fp16 | fp32 | source |
| --- | --- | --- | --- |
| 8.0 | 2,048 | 128 | A100 white paper |
| 8.6, 8.9 | 1,024; GeForce 512 | 256 | Ampere GA102 and Ada white papers |
| 9.0 | 4,096 | 256 | H100 white paper |
| 10.0, 10.3 | 8,192 | 256 | from the 2.25 PFLOP/s of a B200 |
| 12.0, 12.1 | 1,024; GeForce 512 | 256 | RTX Blackwell white paper |

The resulting rates lie within 15% of those in data sheets, because torch reports the highest possible clocks. The
bandwidth of L2 is not available. GPUs of capability 8.0 and the data-centre GPUs after it are given the A100's bytes in
a clock, or proportionally fewer if they have fewer multiprocessors. Other GPUs are given 20 bytes for each
multiprocessor, which is a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from surgeon.errors import UsageError


@dataclass(frozen=True)
class Device:
    """A GPU. rates: FLOP/s by dtype. memory, cache: bytes per second. cache_size: bytes of L2.

    gpu: its name in torch. rows: the most tokens in a tile, in half types. source: where rates and memory bandwidth
    come from. cache_sources: where the cache's size and bandwidth come from.
    """

    name: str
    title: str
    gpu: str
    rates: Mapping[str, float]
    memory: float
    cache: float
    cache_size: float
    rows: int
    source: str
    cache_sources: tuple[str, str]

    @property
    def hopper(self) -> bool:
        """Whether it uses the tiles that were chosen on an H100."""
        return self.rows == 128


def _rates(half: float, full: float) -> dict[str, float]:
    return {"float32": full, "bfloat16": half, "float16": half}


_CACHE_CLOCK = 5120.0  # bytes
_HOPPER_CACHE = ("NVIDIA H100 white paper", "not published: 5,120 bytes a clock, as the A100, at 1.755 GHz")

DEVICES = {
    device.name: device
    for device in (
        Device(
            "h100", "NVIDIA H100 SXM5 80 GB", "NVIDIA H100 80GB HBM3", _rates(989e12, 67e12), 3.35e12,
            _CACHE_CLOCK * 1.755e9, 50e6, 128, "NVIDIA H100 data sheet", _HOPPER_CACHE,
        ),
        Device(
            "h200", "NVIDIA H200 SXM5 141 GB", "NVIDIA H200", _rates(989e12, 67e12), 4.8e12,
            _CACHE_CLOCK * 1.755e9, 50e6, 128, "NVIDIA H200 data sheet", _HOPPER_CACHE,
        ),
        Device(
            "a100", "NVIDIA A100 SXM4 80 GB", "NVIDIA A100-SXM4-80GB", _rates(312e12, 19.5e12), 2.039e12,
            _CACHE_CLOCK * 1.41e9, 40e6, 64, "NVIDIA A100 80GB data sheet",
            ("NVIDIA A100 white paper", "NVIDIA A100 white paper: 5,120 bytes a clock, at 1.41 GHz"),
        ),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """Return the device called `name`, in upper or lower case.

    Raises:
        UsageError: there is no such device.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UsageError(f"No model of a device '{name}'. There are: {', '.join(DEVICES)}.") from None


class Properties(Protocol):
    """What `torch.cuda.get_device_properties` returns. Clocks are in kHz, the bus in bits and the cache in bytes."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    clock_rate: int
    memory_clock_rate: int
    memory_bus_width: int
    L2_cache_size: int


# FLOP in a clock of one multiprocessor by compute capability: half types, the same on a GeForce, fp32.
_PER_CLOCK = {
    (8, 0): (2048, 2048, 128),
    (8, 6): (1024, 512, 256),
    (8, 9): (1024, 512, 256),
    (9, 0): (4096, 4096, 256),
    (10, 0): (8192, 8192, 256),
    (10, 3): (8192, 8192, 256),
    (12, 0): (1024, 512, 256),
    (12, 1): (1024, 512, 256),
}
_DATA_CENTRE = {(8, 0), (9, 0), (10, 0), (10, 3)}
_CACHE_OF_ONE = 20.0  # bytes in a clock for a multiprocessor


def model_of(gpu: torch.device | int | None = None) -> Device | None:
    """Return the model of a GPU of this machine, by default the current one. None if it has no model, as all of AMD's.

    Raises:
        RuntimeError, AssertionError: torch finds no GPU.
    """
    return None if torch.version.hip else find_gpu(torch.cuda.get_device_properties(gpu))


def find_gpu(found: Properties) -> Device | None:
    """Return the model of an NVIDIA GPU: from `DEVICES` if it is one of them, otherwise from its properties.

    None if torch does not report enough, or if the compute capability is not in the table.
    """
    for device in DEVICES.values():
        if device.gpu == found.name:
            return device
    capability = (found.major, found.minor)
    numbers = (found.multi_processor_count, found.clock_rate, found.memory_clock_rate, found.memory_bus_width)
    if capability not in _PER_CLOCK or min(*numbers, found.L2_cache_size) <= 0:
        return None
    multiprocessors, clock, memory_clock, width = numbers
    clocks = 1e3 * clock * multiprocessors  # in a second, of all of them
    central = capability in _DATA_CENTRE
    cache = min(1.0, multiprocessors / 108) * _CACHE_CLOCK if central else _CACHE_OF_ONE * multiprocessors
    professional, geforce, full = _PER_CLOCK[capability]
    return Device(
        name=found.name,
        title=found.name,
        gpu=found.name,
        rates=_rates(clocks * (geforce if "GeForce" in found.name else professional), clocks * full),
        memory=2e3 * memory_clock * width / 8,
        cache=1e3 * clock * cache,
        cache_size=float(found.L2_cache_size),
        rows=128 if central and capability > (8, 0) else 64,
        source="from its clocks, as torch reports them",
        cache_sources=("reported by torch", "assumed from its clocks"),
    )
