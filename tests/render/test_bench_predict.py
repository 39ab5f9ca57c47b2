"""How predicted times look."""

from __future__ import annotations

from surgeon.jobs.bench_predict import bench_predict
from surgeon.jobs.options import LayerOptions
from surgeon.kernels.gpu_model.devices import DEVICES
from surgeon.render.bench_predict import devices_view, prediction_view
from surgeon.text.plain import plain_text

from .benchmarks import lines


def test_a_prediction_says_that_it_is_one_and_what_it_assumes() -> None:
    found = bench_predict("h100", LayerOptions(tokens="1,8192", dtype="bfloat16"))
    shown = lines(prediction_view(found))
    assert max(map(len, shown)) <= 100
    assert shown[0] == "A model, not a measurement."
    assert sum(line.startswith("assumed: ") for line in shown) == 5
    assert any("NVIDIA H100 data sheet" in line for line in shown)
    at = shown.index(next(line for line in shown if line.startswith("bfloat16, 8,192 tokens  dense ")))
    assert shown[at + 1].split() == ["size", "5.0%", "10%", "20%", "50%", "100%", "up", "to", "way"]
    assert [line.split()[0] for line in shown[at + 2 : at + 6]] == ["128", "24", "6", "best"]
    best = shown[at + 5].split()
    assert (best[1], best[-1]) == ("128", "dense")


def test_every_device_has_its_sources() -> None:
    text = plain_text(devices_view(list(DEVICES.values())), 100)
    assert text.count("data sheet") == 9
    assert all(words in text for words in ("989 TFLOP/s", "3.35 TB/s", "4.80 TB/s", "2.04 TB/s", "50.0 MB", "5,120"))
