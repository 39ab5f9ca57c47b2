"""`surgeon bench`: layers, saved surgeries, and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import surgeon
from surgeon.bench.methods import METHODS

from .harness import Run

SMALL = ("--width", "8", "--hidden", "32", "--seconds", "0.0001")
METHODS_BUT_COMPILED = ",".join(name for name in METHODS if name != "compiled")


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the real one takes longer than everything else here."""
    monkeypatch.setattr("surgeon.bench.timing.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine._SIDE", {"cpu": 32})
    monkeypatch.setattr("surgeon.bench.machine._BUFFER", {"cpu": 1 << 16})


def test_a_layer_is_timed_by_every_method(run: Run, tmp_path: Path) -> None:
    grid = ("--tokens", "1, 20", "--size", "8,4", "--share", "0.25,1", "--mask", "uniform,skewed", "--dtype", "float32")
    files = ("-o", "times.json", "-o", "times.png")
    result = run(
        "bench", *SMALL, *grid, "--methods", METHODS_BUT_COMPILED, *files, "--device", "cpu", "--output", "json"
    )
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"machine", "width", "hidden", "gated", "activation", "cells"}
    assert len(found["cells"]) == 2 * 2 * 2 * 2
    assert [(c["tokens"], c["size"], c["mask"]) for c in found["cells"][::2]] == [
        (tokens, size, mask) for tokens in (1, 20) for size in (8, 4) for mask in ("uniform", "skewed")
    ]
    for cell in found["cells"]:
        assert list(cell["methods"]) == METHODS_BUT_COMPILED.split(",")
        for timing in cell["methods"].values():
            assert timing["milliseconds"] > 0
            assert timing["error"] < 1e-5
        assert cell["gain"] == cell["methods"]["dense"]["milliseconds"] / cell["methods"]["ours"]["milliseconds"]
        assert cell["ceiling"] == 1 / cell["executed"]
    assert json.loads((tmp_path / "times.json").read_text()) == found
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert "Written to times.png." in result.err
    assert "bench  16/16" in result.err


def test_chosen_methods_are_shown(run: Run) -> None:
    args = ("--tokens", "2", "--size", "4", "--share", "0.5", "--gated", "--methods", "ours-dense, published,ours")
    result = run("-q", "bench", *SMALL, *args, "--device", "cpu", "--activation", "silu")
    assert (result.code, result.err) == (0, "")
    assert "float32, 2 tokens, 8 experts × 4" in result.out
    assert "bfloat16, 2 tokens" in result.out
    assert "published did not run: the published method has no gated layers" in result.out
    assert "dense\n/ours" not in result.out


def test_a_saved_surgery_is_timed_end_to_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> object:
        def fails(*inputs: object, **named: object) -> None:
            raise RuntimeError("no C++ compiler was found")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)  # it takes longer than everything else here
    before = surgeon.get_tau(surgeon.load("bert-moe"))
    args = (
        "--seconds",
        "0.0001",
        "--dense",
        "bert",
        "--tau",
        "0,0.9",
        "--batch",
        "5",
        "--length",
        "3",
        "-o",
        "times.png",
    )
    result = run("bench", "bert-moe", *args, "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"model", "batch", "length", "machine", "times", "notes"}
    assert (found["batch"], found["length"]) == (5, 3)
    times = found["times"]
    assert times["dense"] > 0
    assert times["compiled"] is None
    assert times["why"] == {
        f"The {model} was not compiled": "no C++ compiler was found" for model in ("dense model", "rewritten model")
    }
    assert [setting["tau"] for setting in times["settings"]] == [None, 0.0, 0.9]
    stored, every, few = times["settings"]
    assert every["executed"] == 1.0 > few["executed"]
    for setting in (stored, every, few):
        assert setting["torch"] > 0
        assert setting["compiled"] is None
        assert setting["gain"] == times["dense"] / setting["ours"]
    assert "was not compiled: no C++ compiler was found" in found["notes"][0]
    assert surgeon.get_tau(surgeon.load("bert-moe")) == before


def test_experts_that_are_still_masked_are_skipped_all_the_same(run: Run) -> None:
    result = run("-q", "bench", "masked", "--seconds", "0.0001", "--batch", "3")
    assert result.code == 0, result.err
    assert "as stored" in result.out
    assert "3 samples" in result.out
    assert "give the model before the surgery with --dense" in result.out
    assert "gain" in result.out


def test_a_device_is_predicted_and_listed(run: Run, tmp_path: Path) -> None:
    args = ("--model", "A100", "--tokens", "1,4096", "--size", "128,16", "--share", "0.1,1", "--dtype", "bfloat16")
    result = run("bench", *args, "-o", "model.png", "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"device", "width", "hidden", "gated", "points", "advice", "assumptions"}
    assert found["device"]["title"] == "NVIDIA A100 SXM4 80 GB"
    assert len(found["points"]) == 2 * 2 * 2
    assert all(point["gain"] == pytest.approx(point["dense"] / point["ours"]) for point in found["points"])
    assert [set(advice["best"]) for advice in found["advice"]] == [{"0.1", "1.0"}] * 2
    assert (tmp_path / "model.png").exists()
    assert run("bench", "--model", "a100", *args[2:]).out.startswith("A model, not a measurement.")
    listed = run("bench", "--model", "list", "--output", "json").json
    assert [device["name"] for device in listed["devices"]] == ["h100", "h200", "a100"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "b99"), "No model of a device 'b99'. There are: h100, h200, a100."),
        (("--model", "h100", "masked"), "Give DIR or --model, not both"),
        (("--model", "h100", "--threads", "2"), "--threads is about running something, and --model runs nothing"),
        (("--model", "list", "-o", "list.json"), "--model list writes no file"),
        (
            ("--size", "100"),
            "Experts of 100 neurons do not divide a hidden width of 3072: 72 neurons would be left over. "
            "Give another --size. Nearest: 96, 128.",
        ),
        (("--width", "0"), "A layer's width, hidden width and expert size are at least 1."),
        (("--size", "6.5"), "--size 6.5: give whole numbers from 1 on, separated by commas."),
        (("--tokens", "0"), "--tokens 0: give whole numbers from 1 on"),
        (("--share", "0.1,2"), "--share 0.1,2: give numbers from 0 to 1, above 0, separated by commas."),
        (("--share", "nan"), "--share nan: give numbers"),
        (("--dtype", "int8"), "--dtype int8: there are float32, bfloat16, float16."),
        (("--mask", "random"), "--mask random: there are uniform, skewed, clustered."),
        (("--methods", "best"), "--methods best: there are dense, compiled, masked"),
        (("--activation", "step"), "unknown activation 'step'"),
        (("--threads", "0"), "--threads is at least 1"),
        (("--seconds", "0"), "--seconds above 0"),
        (("--device", "tpu"), "--device tpu: give cpu or cuda."),
        (("--batch", "3"), "--batch is about a saved surgery: give its directory too."),
        (("masked", "--tokens", "3"), "--tokens describes a layer with random weights"),
        (("masked", "--tau", "2"), "--tau 2: give numbers from 0 to 1, separated by commas."),
        (("masked", "--batch", "0"), "--batch and --length are at least 1."),
        (("masked", "--length", "0"), "--batch and --length are at least 1."),
        (("bert-moe", "--length", "100000"), "The model cannot be called with so many samples or tokens ("),
        (("masked", "--device", "cuda"), "--device cuda: torch finds no GPU here"),
        (("-o", "times.csv"), "times.csv: a table is written as .json, a plot as .png."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused(run: Run, args: tuple[str, ...], words: str) -> None:
    result = run("bench", *args)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_a_gpu_that_is_not_there_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "--device", "cuda")
    assert result.code == 2
    assert "--device cuda: torch finds no GPU here. surgeon bench --model h100 predicts for one." in result.err


def test_times_are_predicted_for_the_gpu_of_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("bench", "--model", "cuda", "--tokens", "4096", "--size", "128", "--share", "0.1")
    gpu = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, clock_rate=2_040_000,
        memory_clock_rate=6_251_000, memory_bus_width=192, L2_cache_size=48 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--model cuda: torch finds no GPU here. --model list has those" in run(*args).err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu.name)
    found = run(*args, "--output", "json").json
    assert (found["device"]["title"], found["device"]["memory"]) == ("NVIDIA L4", pytest.approx(300e9, rel=0.01))
    gpu.major = 7
    result = run(*args)
    assert result.code == 2
    assert "--model cuda: there is no model of NVIDIA L4. --model list has those there are." in result.err


def test_a_model_without_experts_is_refused(run: Run) -> None:
    result = run("-q", "bench", "bert", "--seconds", "0.0001")
    assert result.code == 2
    assert "The graph has no experts, so there is nothing to compare. Apply moeify and lower first." in result.err
