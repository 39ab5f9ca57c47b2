"""`surgeon bench predict`: what GPUs should take for a layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .harness import Run


def test_a_device_is_predicted_and_listed(run: Run, tmp_path: Path) -> None:
    args = ("--tokens", "1,4096", "--size", "128,16", "--share", "0.1,1", "--dtype", "bfloat16")
    result = run("bench", "predict", "A100", *args, "-o", "model.png", "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"device", "width", "hidden", "gated", "points", "advice", "assumptions"}
    assert found["device"]["title"] == "NVIDIA A100 SXM4 80 GB"
    assert len(found["points"]) == 2 * 2 * 2
    assert all(point["gain"] == pytest.approx(point["dense"] / point["ours"]) for point in found["points"])
    assert [set(advice["best"]) for advice in found["advice"]] == [{"0.1", "1.0"}] * 2
    assert (tmp_path / "model.png").exists()
    assert run("bench", "predict", "a100", *args).out.startswith("A model, not a measurement.")
    listed = run("bench", "predict", "list", "--output", "json").json
    assert [device["name"] for device in listed["devices"]] == ["h100", "h200", "a100"]


def test_times_are_predicted_for_the_gpu_of_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("bench", "predict", "cuda", "--tokens", "4096", "--size", "128", "--share", "0.1")
    gpu = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, clock_rate=2_040_000,
        memory_clock_rate=6_251_000, memory_bus_width=192, L2_cache_size=48 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda: torch finds no GPU. Give another device;" in run(*args).err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu.name)
    found = run(*args, "--output", "json").json
    assert (found["device"]["title"], found["device"]["memory"]) == ("NVIDIA L4", pytest.approx(300e9, rel=0.01))
    gpu.major = 7
    result = run(*args)
    assert result.code == 2
    assert (
        "cuda: there is no model of NVIDIA L4. Give another device; to see them, run surgeon bench predict list."
        in result.err
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "Missing argument 'DEVICE'. See surgeon bench predict --help."),
        (("b99",), "No model of a device 'b99'. There are: h100, h200, a100."),
        (("h100", "--threads", "2"), "No such option: --threads"),
        (("h100", "--size", "100"), "Experts of 100 neurons do not divide a hidden width of 3072"),
        (("h100", "--dtype", "int8"), "--dtype int8: choose from float32, bfloat16, float16."),
        (("h100", "-o", "times.csv"), "Cannot write times.csv: give a name that ends in .json (numbers)"),
        (("list", "-o", "list.json"), "predict list takes no layer options and writes no file"),
        (("list", "--tokens", "3"), "predict list takes no layer options and writes no file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused(run: Run, args: tuple[str, ...], words: str) -> None:
    result = run("bench", "predict", *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err
