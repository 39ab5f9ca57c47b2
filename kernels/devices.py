"""GPUs that `cost_model` knows, by what their vendors publish.

| device | bf16, fp16 | fp32 | memory | L2 cache | source |
| --- | --- | --- | --- | --- | --- |
| H100 SXM5 80 GB | 989 TFLOP/s | 67 TFLOP/s | 3.35 TB/s | 50 MB, 9.0 TB/s | data sheet; cache: see below |
| H200 SXM5 141 GB | 989 TFLOP/s | 67 TFLOP/s | 4.8 TB/s | 50 MB, 9.0 TB/s | data sheet; cache as the H100 |
| A100 SXM4 80 GB | 312 TFLOP/s | 19.5 TFLOP/s | 2.039 TB/s | 40 MB, 7.2 TB/s | data sheet; cache: white paper |

Data sheets give twice the bf16 rate for 2:4 sparse weights; here it is the dense one. The A100's white paper gives
5,120 bytes a clock for reads of L2, at 1.41 GHz; the H100's gives only the size, so it is given the same at 1.755 GHz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.errors import UsageError


@dataclass(frozen=True)
class Device:
    """A GPU. rates: FLOP/s by dtype. memory, cache: bytes a second. cache_size: of L2, bytes.

    rows: most tokens in a tile, in half types. source: where rates and memory are from; cache_sources: where the
    cache's size and its bandwidth are.
    """

    name: str
    title: str
    rates: Mapping[str, float]
    memory: float
    cache: float
    cache_size: float
    rows: int
    source: str
    cache_sources: tuple[str, str]

    @property
    def hopper(self) -> bool:
        """Whether it has the tiles that were chosen on an H100."""
        return self.rows == 128


def _rates(half: float, full: float) -> dict[str, float]:
    return {"float32": full, "bfloat16": half, "float16": half}


_CACHE_CLOCK = 5120.0  # bytes
_HOPPER_CACHE = ("NVIDIA H100 white paper", "not published: 5,120 bytes a clock, as the A100, at 1.755 GHz")

DEVICES = {
    device.name: device
    for device in (
        Device(
            "h100", "NVIDIA H100 SXM5 80 GB", _rates(989e12, 67e12), 3.35e12, _CACHE_CLOCK * 1.755e9, 50e6, 128,
            "NVIDIA H100 data sheet", _HOPPER_CACHE,
        ),
        Device(
            "h200", "NVIDIA H200 SXM5 141 GB", _rates(989e12, 67e12), 4.8e12, _CACHE_CLOCK * 1.755e9, 50e6, 128,
            "NVIDIA H200 data sheet", _HOPPER_CACHE,
        ),
        Device(
            "a100", "NVIDIA A100 SXM4 80 GB", _rates(312e12, 19.5e12), 2.039e12, _CACHE_CLOCK * 1.41e9, 40e6, 64,
            "NVIDIA A100 80GB data sheet",
            ("NVIDIA A100 white paper", "NVIDIA A100 white paper: 5,120 bytes a clock, at 1.41 GHz"),
        ),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device called `name`, in any case.

    Raises:
        UsageError: there is no such device.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UsageError(f"No model of a device '{name}'. There are: {', '.join(DEVICES)}.") from None


def find_gpu(name: str) -> Device | None:
    """The device that stands for a GPU, by the name torch gives it; None if there is none."""
    return next((device for device in DEVICES.values() if device.name in name.lower()), None)
