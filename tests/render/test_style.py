"""The look of pictures: titles that have room."""

from __future__ import annotations

import pytest

from surgeon.render.style import panel_title, short_path

QUERY = "bert.encoder.layer.10.attention.self.query.inputs"


@pytest.mark.parametrize(
    ("most", "shown"),
    [
        (60, QUERY), (40, "…layer.10.attention.self.query.inputs"), (24, "…10…self.query.inputs"),
        (20, "…10…query.inputs"), (3, "…10…inputs"),
    ],
)  # fmt: skip
def test_a_path_keeps_the_number_of_its_layer_and_its_end(most: int, shown: str) -> None:
    assert short_path(QUERY, most) == shown


def test_paths_without_numbers_keep_their_end() -> None:
    assert short_path("a.very.long.path.to.something", 20) == "…path.to.something"
    assert short_path("one", 1) == "one"


def test_titles_of_panels_beside_one_another_do_not_meet() -> None:
    titles = [panel_title(QUERY, ": 100%", count) for count in (1, 4, 16)]
    assert titles[0] == f"{QUERY}: 100%"
    assert titles[1] == titles[2]
    assert len(titles[1]) <= 34
    assert titles[1].endswith(": 100%")
