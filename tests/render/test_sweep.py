"""How a sweep looks, on a screen and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.data.losses import Quality
from surgeon.jobs.sweep import Swept
from surgeon.measure.sweep import Dense, Point
from surgeon.render.files import write_result
from surgeon.render.screen import to_json
from surgeon.render.sweep import draw_sweep, sweep_view
from surgeon.text.plain import plain_text


def accuracy(value: float) -> Quality:
    return Quality("accuracy", value, True, 60)


def token_loss(value: float) -> Quality:
    return Quality("loss per token", value, False, 1000)


DENSE = Dense(4_290_000, accuracy(0.95), 2.04)
POINTS = [
    Point(0.0, accuracy(0.95), 1.0, 1.025, 5_060_000, 1.18, milliseconds=3.14),
    Point(0.1, accuracy(0.90), 0.23, 0.255, 2_950_000, 0.687, milliseconds=1.5),
]


def cells(points: list[Point], dense: Dense) -> list[list[str]]:
    return [line.split() for line in plain_text(sweep_view(points, dense), 160).splitlines()]


def test_sweep_shows_what_each_tau_costs_in_quality() -> None:
    header, dense, every, less, measured = cells(POINTS, DENSE)[:5]
    assert " ".join(header) == "tau accuracy experts that ran converted layers multiply-adds of dense ms"
    assert dense == ["dense", "0.950", "100%", "4.29", "M", "100%", "2.0"]
    assert every == ["0", "(all", "experts)", "0.950", "100%", "102%", "5.06", "M", "118%", "3.1"]
    assert less == ["0.1", "0.900", "-0.05", "23%", "26%", "2.95", "M", "69%", "1.5"]
    assert measured[:4] == ["note:", "accuracy", "on", "60"]


def test_columns_that_say_nothing_are_left_out() -> None:
    bare = [Point(0.1, token_loss(21.5), 0.23, 0.25, 2_950_000, None)]
    header, point, *rest = cells(bare, Dense(None, token_loss(20.0)))
    assert " ".join(header) == "tau loss per token experts that ran converted layers multiply-adds"
    assert point == ["0.1", "21.5", "+1.5", "23%", "25%", "2.95", "M"]
    assert rest[0][:4] == ["note:", "loss", "per", "token"]


def test_a_dense_model_of_unknown_quality_is_told_how_to_be_known() -> None:
    lines = plain_text(sweep_view(POINTS, Dense(4_290_000)), 160).splitlines()
    assert lines[1].split() == ["dense", "100%", "4.29", "M", "100%"]
    assert lines[-1] == "The dense model's quality on this data is not known. Give the model with --dense."
    assert "-0.05" in lines[3]  # then the first point is what the others are compared with


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
