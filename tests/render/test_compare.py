"""How a comparison looks, on a screen and in files."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from surgeon.data.quality import Change, Quality
from surgeon.jobs.compare import Compared
from surgeon.measure.compare import Comparison
from surgeon.measure.curves import Curve
from surgeon.measure.read_off import Difference, Kept
from surgeon.measure.sweep import Dense, Point
from surgeon.render.compare import compared_view, write_comparison
from surgeon.render.files import write_result
from surgeon.render.frontier_plot import _limits
from surgeon.text.plain import plain_text


def accuracy(value: float, change: Change | None = None) -> Quality:
    return Quality("accuracy", value, True, 400, "samples", 400, value - 0.02, value + 0.02, change)


def loss(value: float) -> Quality:
    return Quality("loss per token", value, False, 900, "tokens", 40, None, None)


def point(tau: float | None, quality: Quality, share: float, milliseconds: float | None = None) -> Point:
    return Point(tau, quality, share, share + 0.02, int(5e6 * share), share / 2 + 0.4, "max", "own", milliseconds)


LARGE = tuple(point(tau, accuracy(value, Change(value - 0.9, value - 0.93, value - 0.87, 400)), share)
              for tau, value, share in ((0.0, 0.91, 1.0), (0.1, 0.90, 0.4), (0.5, 0.80, 0.1)))  # fmt: skip
SMALL = tuple(replace(one, relative=0.9 * (one.relative or 0.0)) for one in LARGE)
FOUND = Comparison(
    "classification", 0.99, 0.891, Dense(5_000_000, accuracy(0.9), 4.0),
    (
        Curve("large", "max", "own", LARGE, Kept(0.391, False, 0.3, None), Kept(0.58, False, 0.55, 0.613), 2.5),
        Curve("small|x", "max", "own", SMALL, None, Kept(0.5, True, 0.5, 0.55), 2.0,
              Difference(-0.08, -0.1, 0.002, "at most"), Change(0.02, 0.01, 0.03, 400)),
    ),
    {"large": point(None, accuracy(0.89), 0.3)},
)  # fmt: skip
COMPARED = Compared({"large": "runs/1", "small|x": "runs/2"}, "400 samples", FOUND, ("Something.",))


def test_the_first_table_shows_what_the_quality_costs() -> None:
    lines = plain_text(compared_view(COMPARED), 220).splitlines()
    header, dense, first, second, *_ = (" ".join(line.split()) for line in lines)
    assert header == (
        "surgery converted layers at 99% whole model at 99% than large, points accuracy at the cost of large ms"
    )
    assert dense == "dense 100% 100% 4.0"
    assert first == "large 39.1% [30.0, —] 58.0% [55.0, 61.3] 2.5"
    assert second == "small|x — ≤ 50.0% [50.0, 55.0] ≤ -8.0 [-10.0, +0.2] +0.02 [+0.01, +0.03] 2.0"
    text = " ".join(lines)
    assert "The dense model has accuracy 0.900 [0.880, 0.920] on 400 samples; 99% of it is 0.891." in text
    assert "note: Something." in text


def test_the_second_table_shows_every_setting() -> None:
    lines = [" ".join(line.split()) for line in plain_text(compared_view(COMPARED), 220).splitlines()]
    at = lines.index("surgery tau accuracy change ran converted layers whole model ms")
    assert lines[at + 1] == "dense 0.900 [0.880, 0.920] 100% 100% 4.0"
    assert lines[at + 3] == "large 0.1 0.900 [0.880, 0.920] +0 [-0.03, +0.03] 40% 42% 60%"
    assert lines[at + 5].startswith("large as stored 0.890 ")
    assert [line.split()[0] for line in lines[at + 2 : at + 9]] == ["large"] * 4 + ["small|x"] * 3


def test_losses_and_agreement_are_told_in_their_own_words() -> None:
    points = tuple(replace(one, quality=loss(2.0)) for one in LARGE)
    curves = (Curve("a", "max", "own", points),)
    of_loss = replace(FOUND, wanted=2.02, dense=Dense(1, loss(2.0)), curves=curves, stored={})
    text = " ".join(plain_text(compared_view(replace(COMPARED, found=of_loss))).split())
    assert "loss per token 2 on 900 tokens of 40 samples; 1.01 times it is 2.02." in text
    agreed = replace(FOUND, task=None, dense=Dense(1), wanted=0.99)
    text = " ".join(plain_text(compared_view(replace(COMPARED, found=agreed))).split())
    assert "99% of full agreement with the dense model is to be kept, on 400 samples." in text


def test_numbers_and_tables_are_written(tmp_path: Path) -> None:
    for name in ("a.csv", "a.md"):
        write_comparison(COMPARED, tmp_path / name)
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["surgery"] for row in rows] == ["dense", *["large"] * 4, *["small|x"] * 3]
    assert float(rows[2]["value"]) == 0.9
    assert float(rows[2]["change_low"]) == pytest.approx(-0.03)
    assert (rows[4]["tau"], rows[0]["milliseconds"]) == ("stored", "4.0")
    table = (tmp_path / "a.md").read_text()
    assert "| large | 39.1% [30.0, —] | 58.0% [55.0, 61.3] |  |  | 2.5 |" in table
    assert "| small\\|x | — |" in table


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
@pytest.mark.parametrize("unknown", [False, True])
def test_a_picture_is_drawn_without_a_display(
    tmp_path: Path, name: str, unknown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "TkAgg")  # one that needs a display: it must not be asked for
    found = FOUND
    if unknown:  # the dense model's cost, and the interval of the quality
        points = tuple(replace(one, relative=None, quality=loss(2.0)) for one in LARGE)
        curves = (Curve("a", "max", "own", points), Curve("a", "max", "oracle", points))
        found = replace(FOUND, wanted=2.02, dense=Dense(None, loss(2.0)), curves=curves, stored={})
    compared = replace(COMPARED, found=found)
    write_result(compared, tmp_path / name, lambda file: write_comparison(compared, file))
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") or b"<svg" in content


def test_the_axis_of_quality_is_wider_than_its_noise() -> None:
    bottom, top = _limits(FOUND)
    assert bottom <= 0.9 - 1.2 * 0.04
    assert bottom < FOUND.wanted < 0.91 < top <= 1.0
    noisy = Quality("accuracy", 0.9, True, 20, "samples", 20, 0.7, 0.98)
    curves = (Curve("a", "max", "own", tuple(replace(one, quality=noisy) for one in LARGE)),)
    assert _limits(replace(FOUND, curves=curves))[0] < 0.6
    points = tuple(replace(one, quality=loss(2.0)) for one in LARGE)
    of_loss = replace(FOUND, wanted=2.02, dense=Dense(1, loss(2.0)), curves=(Curve("a", "max", "own", points),))
    low, high = _limits(of_loss)
    assert low > 2.02  # at the lower end stands the larger loss
    assert high < 2.0
    assert math.isfinite(low - high)
