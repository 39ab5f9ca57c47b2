"""How a surgery's times look, on the screen and as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from surgeon.bench.whole import TimedSetting, WholeTimes
from surgeon.jobs.bench_surgery import SurgeryBenchmark
from surgeon.json_values import to_json
from surgeon.render.bench_surgery import surgery_plot, surgery_view
from surgeon.render.files import write_result

from .benchmarks import MACHINE, lines

SURGERY = SurgeryBenchmark(
    "bert-surgery", 8, 128, MACHINE,
    WholeTimes(
        20.0, None, {"dense model": "no C++ compiler"},
        [TimedSetting(None, 0.42, 12.5, 13.0, 14.0, 1.6), TimedSetting(0.9, 0.1, 25.0, None, 8.0, 0.8)],
    ),
    ("The dense model was not compiled: no C++ compiler.",),
)  # fmt: skip


@pytest.mark.parametrize(("torch", "log"), [(14.0, False), (400.0, True)])
def test_a_surgery_is_drawn_so_that_every_line_can_be_told(torch: float, log: bool) -> None:
    """By the logarithm where times are far apart, and with one point for what is stored and the tau that gave it."""
    stored, *others = SURGERY.times.settings
    settings = [stored, dataclasses.replace(stored, tau=0.8, torch=torch), *others]
    times = dataclasses.replace(SURGERY.times, settings=settings)
    plot = surgery_plot(dataclasses.replace(SURGERY, times=times))
    assert plot.log == log
    (panel,) = plot.panels
    assert panel.shares == [0.1, 0.42]
    assert panel.lines["torch"] == [8.0, torch]


def test_a_surgery_has_a_row_for_each_tau() -> None:
    shown = lines(surgery_view(SURGERY))
    assert max(map(len, shown)) <= 100
    text = [line.split() for line in shown]
    assert "dense model: 20.0 ms" in shown
    assert ["as", "stored", "42%", "12.5", "13.0", "14.0", "1.60×"] in text
    assert ["0.9", "10%", "25.0", "8.00", "0.80×"] in text
    assert any("not compiled: no C++ compiler." in line for line in shown)


def test_files_are_written(tmp_path: Path) -> None:
    write_result(SURGERY, tmp_path / "a.json", surgery_plot(SURGERY).draw)
    write_result(SURGERY, tmp_path / "a.png", surgery_plot(SURGERY).draw)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(to_json(SURGERY)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
