"""How a sweep looks, on a screen and in files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from surgeon.data.quality import Change, Quality
from surgeon.jobs.sweep import Swept
from surgeon.json_values import to_json
from surgeon.measure.sweep import Dense, Point
from surgeon.render.files import write_result
from surgeon.render.sweep import change_text, draw_sweep, sweep_view
from surgeon.text.plain import plain_text


def accuracy(value: float, change: Change | None = None) -> Quality:
    return Quality("accuracy", value, True, 60, "samples", 60, value - 0.05, value + 0.04, change)


def token_loss(value: float, change: Change | None = None) -> Quality:
    return Quality("loss per token", value, False, 1000, "tokens", 40, None, None, change)


DENSE = Dense(4_290_000, accuracy(0.95), 2.04)
POINTS = [
    Point(0.0, accuracy(0.95, Change(0.0, 0.0, 0.0, 60)), 1.0, 1.025, 5_060_000, 1.18, milliseconds=3.14),
    Point(0.1, accuracy(0.90, Change(-0.05, -0.09, -0.01, 60)), 0.23, 0.255, 2_950_000, 0.687, milliseconds=1.5),
]


def cells(points: list[Point], dense: Dense) -> list[list[str]]:
    return [line.split() for line in plain_text(sweep_view(points, dense), 160).splitlines()]


def test_sweep_shows_what_each_tau_costs_in_quality() -> None:
    header, dense, every, less, *measured = cells(POINTS, DENSE)
    assert " ".join(header) == "tau accuracy change ran converted layers multiply-adds of dense ms"
    assert dense == ["dense", "0.950", "[0.900,", "0.990]", "100%", "4.29", "M", "100%", "2.0"]
    assert every[:5] == ["0", "(everything)", "0.950", "[0.900,", "0.990]"]
    assert every[5:] == ["0", "100%", "102%", "5.06", "M", "118%", "3.1"]
    assert less[:4] == ["0.1", "0.900", "[0.850,", "0.940]"]
    assert less[4:] == ["-0.05", "[-0.09,", "-0.01]", "23%", "26%", "2.95", "M", "69%", "1.5"]
    words = " ".join(word for line in measured for word in line)
    assert words.startswith("note: accuracy on 60 samples. In brackets: 95% intervals. change: from the dense model")
    assert "On fewer than 300 samples no change is called better or worse." in words


def test_columns_that_say_nothing_are_left_out() -> None:
    bare = [Point(0.1, token_loss(21.5), 0.23, 0.25, 2_950_000, None)]
    header, point, *rest = cells(bare, Dense(None, token_loss(20.0)))
    assert " ".join(header) == "tau loss per token ran converted layers multiply-adds"
    assert point == ["0.1", "21.5", "23%", "25%", "2.95", "M"]
    assert " ".join(rest[0]).startswith("note: loss per token on 1,000 tokens of 40 samples.")


def test_agreement_has_columns_of_its_own() -> None:
    same = Quality("top-1 agreement", 0.97, True, 60, "samples", 60, 0.95, 0.99)
    apart = Quality("KL divergence", 0.012, False, 60, "samples", 60, 0.01, 0.02)
    header, point = cells([Point(0.1, same, 0.2, 0.3, 1, None, agreement=(same, apart))], Dense(None))[:2]
    assert " ".join(header[:6]) == "tau top-1 agreement KL divergence ran"
    assert point[:7] == ["0.1", "0.970", "[0.950,", "0.990]", "0.012", "[0.01,", "0.02]"]
    header, point = cells([Point(0.1, accuracy(0.9), 0.2, 0.3, 1, None, agreement=(same, apart))], Dense(None))[:2]
    assert " ".join(header[:7]) == "tau accuracy top-1 agreement KL divergence ran"


@pytest.mark.parametrize(("low", "high", "samples", "higher", "style"), [
    (-0.09, -0.01, 300, True, "red"), (-0.09, -0.01, 299, True, ""), (-0.09, 0.001, 300, True, ""),
    (0.01, 0.09, 300, True, "green"), (-0.09, -0.01, 300, False, "green"), (0.01, 0.09, 300, False, "red"),
])  # fmt: skip
def test_colours_stand_for_more_than_chance(low: float, high: float, samples: int, higher: bool, style: str) -> None:
    change = Change((low + high) / 2, low, high, samples)
    shown = change_text(change, higher_is_better=higher)
    assert shown.style == style
    assert str(shown)


def test_a_dense_model_of_unknown_quality_is_told_how_to_be_known() -> None:
    lines = plain_text(sweep_view(POINTS, Dense(4_290_000)), 160).splitlines()
    assert lines[1].split() == ["dense", "100%", "4.29", "M", "100%"]
    assert lines[-1] == "The dense model's quality on this data is not known. Give the model with --dense."


def test_routers_rules_and_stored_values_are_told_apart() -> None:
    points = [
        Point(0.1, accuracy(0.9), 0.4, 0.42, 3_000_000, 0.7, "max"),
        Point(None, accuracy(0.92), 0.4, 0.42, 3_000_000, 0.7, "top_k"),
        Point(0.1, accuracy(0.94), 0.3, 0.32, 2_800_000, 0.65, "max", "oracle"),
    ]
    header, _, *rows = cells(points, DENSE)[:5]
    assert header[:3] == ["router", "rule", "tau"]
    assert rows[0][:2] == ["max", "0.1"]
    assert rows[1][:3] == ["top_k", "as", "stored"]
    assert rows[2][:3] == ["oracle", "max", "0.1"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal(width: int) -> None:
    lines = plain_text(sweep_view(POINTS, DENSE), width).splitlines()
    assert max(map(len, lines)) <= width


def swept(points: list[Point], dense: Dense = DENSE) -> Swept:
    return Swept("m", "60 samples", "classification", dense, points)


def write(found: Swept, file: Path) -> None:
    write_result(found, file, lambda file: draw_sweep(found, file))


def test_a_table_is_written_as_json(tmp_path: Path) -> None:
    write(swept(POINTS), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == to_json(swept(POINTS))


@pytest.mark.parametrize("points", [
    POINTS,
    [
        *POINTS, Point(None, accuracy(0.9), 0.4, 0.42, 3_000_000, 0.7),
        Point(0.1, accuracy(0.9), 0.4, 0.4, 1, 0.1, "max", "oracle"),
    ],
    [Point(0.1, token_loss(21.5), 0.23, 0.25, 2_950_000, None)],
])  # fmt: skip
def test_a_plot_is_drawn_without_a_display(
    tmp_path: Path, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")  # one that needs a display: it must not be asked for
    write(swept(points), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def words_in(file: Path) -> list[str]:
    return [str(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))]


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    write(swept(POINTS), tmp_path / "a.svg")
    words = words_in(tmp_path / "a.svg")
    for wanted in ("m on 60 samples", "accuracy on 60 samples", "multiply-adds of the whole model, share of dense"):
        assert wanted in words, wanted
    assert any("diamonds: what keeps the quality" in text for text in words)
    # A dense model of unknown quality is not drawn, nor what keeps it.
    write(swept(POINTS, Dense(4_290_000)), tmp_path / "b.svg")
    assert not any("diamonds" in text for text in words_in(tmp_path / "b.svg"))


def test_the_most_sensitive_layers_are_named(tmp_path: Path) -> None:
    points = [
        replace(POINTS[1], layer=f"layer.{at}", quality=accuracy(0.9 - 0.01 * at), shares={f"layer.{at}": 0.2})
        for at in range(6)
    ]
    write(swept(points), tmp_path / "a.svg")
    words = words_in(tmp_path / "a.svg")
    assert [f"layer.{at}" in words for at in range(6)] == [False, False, True, True, True, True]
    assert "m on 60 samples, one layer at a time" in words


def test_names_of_layers_that_lose_the_same_do_not_lie_on_one_another(tmp_path: Path) -> None:
    points = [replace(POINTS[1], layer=f"layer.{at}", shares={f"layer.{at}": 0.2 + 0.1 * at}) for at in range(4)]
    write(swept(points), tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    heights = sorted(float(y) for y in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>layer\.\d</text>', svg))
    assert len(heights) == 4
    assert all(low - high > 10 for high, low in pairwise(heights))


@pytest.mark.parametrize("end", [".png", ".svg", ".pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path: Path, end: str) -> None:
    for name in ("a", "b"):
        write(swept(POINTS), tmp_path / f"{name}{end}")
    assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()
