"""Much in few lines: numbers, times, and the sites of repeated layers."""

from __future__ import annotations

import pytest

from surgeon.display.words import seconds
from surgeon.text.summary import (
    change,
    growth,
    join_paths,
    join_sites,
    natural,
    number,
    percent,
)
from tests.text.reports import site


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (384, "384"), (999, "999"), (1000, "1.00 k"), (33088, "33.1 k"), (999_999, "1.00 M"),
        (1_181_568, "1.18 M"), (12_400_000_000, "12.4 G"), (124_000_000, "124 M"), (3e12, "3.00 T"), (0.5, "0.500"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_changes_and_times_are_short() -> None:
    assert [percent(x) for x in (None, 0.0, 0.0123, 0.423, 1.0)] == ["", "0%", "1.2%", "42%", "100%"]
    assert change(33088, 33088) == "33.1 k"
    assert change(33088, 42304) == "33.1 k → 42.3 k"
    assert (growth(100, 104.7), growth(100, 60), growth(5, 5), growth(0, 5)) == ("+4.7%", "-40%", "", "")
    assert [seconds(x) for x in (0.34, 42.4, 59.7, 200, 7320)] == [
        "0.3 s",
        "42 s",
        "1 min",
        "3 min 20 s",
        "2 h 2 min",
    ]
    assert seconds(4) == "4 s"


def test_paths_of_repeated_layers_are_joined() -> None:
    assert join_paths(["h.0.mlp", "h.1.mlp", "h.2.mlp"]) == "h.0…2.mlp"
    assert join_paths(["h.0", "h.1", "h.3", "h.7", "h.8"]) == "h.0…1,3,7…8"
    assert join_paths(["stages.1.blocks.0.fc", "stages.1.blocks.1.fc"]) == "stages.1.blocks.0…1.fc"
    assert join_paths(["head"]) == "head"


def test_sites_are_joined_only_where_they_look_the_same() -> None:
    paths = ["a.0.x", "a.1.x", "a.0.y", "b.0.x"]
    assert [(group.label, group.count) for group in join_sites([site(path) for path in paths])] == [
        ("a.0…1.x", 2), ("a.0.y", 1), ("b.0.x", 1)
    ]  # fmt: skip
    apart = join_sites([site("a.0", 0.5), site("a.1", 0.25)])
    assert [group.label for group in apart] == ["a.0", "a.1"]


def test_layers_sort_by_number() -> None:
    assert sorted(["h.10", "h.9", "h.mlp", "h.1"], key=natural) == ["h.1", "h.9", "h.10", "h.mlp"]
