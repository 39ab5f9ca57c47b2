"""Names of lines stand apart, and as near to their lines as that allows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgeon.bench.engines import ENGINES
from surgeon.bench.methods import METHODS
from surgeon.render.bench_plot import _STYLES, Panel, Plot, _named_in, spread


def test_names_that_have_room_stay_where_they_are() -> None:
    assert spread([0.1, 0.3, 0.9], 0.1) == pytest.approx([0.1, 0.3, 0.9])


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.1, 0.12, 0.2, 0.21], [0.0, 0.05, 0.5, 0.51, 0.55, 1.0]])
def test_crowded_names_keep_their_order_their_middle_and_a_gap(places: list[float]) -> None:
    moved = spread(places, 0.1)
    assert all(b - a > 0.1 - 1e-9 for a, b in pairwise(moved))
    assert np.mean(moved) == pytest.approx(np.mean(places))


def test_every_method_and_engine_has_a_look_of_its_own() -> None:
    assert {*METHODS, *ENGINES} <= set(_STYLES)
    looks = [(style.colour, style.dashes, style.width) for style in _STYLES.values()]
    own = [look for name, look in zip(_STYLES, looks, strict=True) if name not in ENGINES]
    assert len(set(own)) == len(own)  # engines are never drawn beside the other ways to run experts


def test_a_line_is_named_where_it_was_drawn_last() -> None:
    first = Panel("a", [0.5, 1.0], {"dense": [1.0, 1.0], "loop": [2.0, 3.0]})
    last = Panel("b", [0.5, 1.0], {"dense": [1.0, 1.0], "loop": [None, None]})
    assert _named_in([first, last]) == [["loop"], ["dense"]]


def test_a_name_has_the_colour_of_its_line(tmp_path: Path) -> None:
    shares = [0.5, 1.0]
    for lines, wanted in (({"ours": [1.0, 1.0]}, True), ({"dense": [1.0, 1.0]}, False)):
        Plot("t", [Panel("a", shares, lines)], log=False).draw(tmp_path / "a.png")
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
        assert bool((pixels == (0x00, 0x72, 0xB2)).all(1).any()) == wanted
