"""The models of GPUs: what torch says of them beside their data sheets."""

from types import SimpleNamespace

import pytest
import torch

from surgeon.kernels.gpu_model.devices import DEVICES, Properties, find_gpu, model_of


def properties(
    name: str, capability: tuple[int, int], count: int, clock: int, memory: int, width: int, cache: int
) -> Properties:
    """As torch gives them: clocks in MHz here, the cache in MiB."""
    return SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=count, clock_rate=1000 * clock,
        memory_clock_rate=1000 * memory, memory_bus_width=width, L2_cache_size=cache << 20,
    )  # fmt: skip


GPUS = {
    "a100": properties("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410, 1593, 5120, 40),
    "h100": properties("NVIDIA H100 80GB HBM3", (9, 0), 132, 1980, 2619, 5120, 50),
}


def test_a_gpu_is_known_by_what_torch_calls_it() -> None:
    for name, found in GPUS.items():
        assert find_gpu(found) is DEVICES[name]


# TFLOP/s of half types and fp32 and TB/s of memory, as data sheets have them, dense.
@pytest.mark.parametrize(
    ("found", "half", "full", "memory"),
    [
        (GPUS["a100"], 312, 19.5, 2.039),
        (GPUS["h100"], 989, 67, 3.35),
        (properties("NVIDIA H100 PCIe", (9, 0), 114, 1755, 1593, 5120, 50), 756, 51, 2.0),
        (properties("NVIDIA A10", (8, 6), 72, 1695, 6251, 384, 6), 125, 31.2, 0.6),
        (properties("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, 9751, 384, 6), 71, 35.6, 0.936),
        (properties("NVIDIA L4", (8, 9), 58, 2040, 6251, 192, 48), 121, 30.3, 0.3),
        (properties("NVIDIA L40S", (8, 9), 142, 2520, 9001, 384, 96), 362, 91.6, 0.864),
        (properties("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, 10501, 384, 72), 165, 82.6, 1.008),
        (properties("NVIDIA B200", (10, 0), 148, 1965, 3996, 8192, 126), 2250, 75, 8.0),
        (properties("NVIDIA GeForce RTX 5090", (12, 0), 170, 2407, 14001, 512, 96), 209.5, 104.8, 1.792),
    ],
    ids=lambda found: getattr(found, "name", ""),
)
def test_what_torch_says_of_a_gpu_is_its_data_sheet(found: Properties, half: float, full: float, memory: float) -> None:
    found = SimpleNamespace(**vars(found) | {"name": found.name + "?"})  # not one of the table
    device = find_gpu(found)
    assert device is not None
    assert device.rates["bfloat16"] == device.rates["float16"] == pytest.approx(half * 1e12, rel=0.15)
    assert device.rates["float32"] == pytest.approx(full * 1e12, rel=0.15)
    assert device.memory == pytest.approx(memory * 1e12, rel=0.03)
    assert device.hopper == (found.major in (9, 10))
    assert device.memory < device.cache < 16e12


@pytest.mark.parametrize(
    "found",
    [
        properties("Tesla T4", (7, 5), 40, 1590, 5001, 256, 4),
        properties("NVIDIA next", (13, 0), 200, 2000, 5001, 5120, 100),
        properties("NVIDIA A10?", (8, 6), 72, 0, 6251, 384, 6),
    ],
    ids=["older", "newer", "no clock"],
)
def test_a_gpu_of_which_too_little_is_known_has_no_model(found: Properties) -> None:
    assert find_gpu(found) is None


def test_numbers_of_an_amd_gpu_are_not_taken_for_nvidia_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = properties("AMD Instinct MI250X", (9, 0), 110, 1700, 1600, 4096, 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: alike)
    assert model_of() is not None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert model_of() is None
