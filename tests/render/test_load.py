"""How loads look, on a screen and in a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from surgeon.jobs.load import Loaded, LoadMap
from surgeon.measure.load import LayerLoad, Spread
from surgeon.render.load import _bars, draw_load, loaded_view
from surgeon.text.plain import plain_text

LAYER = LayerLoad(
    "blocks.0.moe", "experts", 1200, 4, Spread(1.5, 0.75, 0, (1, 1, 2), 4), (100, 500, 500, 90, 10), 64,
    Spread(10.25, 3.0, 2, (8, 10, 12), 31),
)  # fmt: skip
INPUTS = LayerLoad("head.inputs", "inputs", 1200, 4, Spread(1.5, 0.75, 0, (1, 1, 2), 4), (100, 500, 500, 90, 10))
TEXT = LoadMap(("a", "film", "\n"), (0.1, 0.5, 0.0))
IMAGE = LoadMap((), (0.1, 0.2, 0.3, 0.4), 2, np.zeros((8, 8)))


def loaded(layers: list[LayerLoad], shown: LoadMap | None) -> Loaded:
    return Loaded("m", "60 samples", {"blocks.0.moe": 0.1}, layers, shown, ("Something.",))


def test_a_layer_is_a_row() -> None:
    header, row, words, *rest = plain_text(loaded_view(loaded([LAYER], TEXT))).splitlines()
    assert header.split("  ")[0] == "layer"
    assert " ".join(row.split()) == "blocks.0.moe 1.5 ± 0.8 of 4 1, 1, 2 ▂██▂▁ 10.2 ± 3.0 of 64 8, 10, 12"
    assert words.startswith("note: over 1,200 tokens of 60 samples: mean ± standard deviation")
    assert rest[:2] == ["", "a 10%  film 50%  '\\n' 0%"]
    assert rest[-1] == "note: Something."


def test_layers_that_skip_inputs_have_no_neurons() -> None:
    header, row, words, *_ = plain_text(loaded_view(loaded([INPUTS], None))).splitlines()
    assert " ".join(header.split()) == "layer inputs that ran quartiles none … all"
    assert " ".join(row.split()) == "head.inputs 1.5 ± 0.8 of 4 1, 1, 2 ▂██▂▁"
    assert "by the inputs that they run." in words
    assert "active" not in words
    header, _, row, *_ = plain_text(loaded_view(loaded([LAYER, INPUTS], None))).splitlines()
    assert "experts, inputs that ran" in header
    assert row.endswith("▂██▂▁")


def test_many_experts_share_a_bar() -> None:
    assert len(_bars([1] * 129)) == 16
    assert _bars([0, 1, 1000]) == " ▁█"


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ([LAYER] * 5, None),
        ([LAYER, INPUTS], None),
        ([INPUTS], None),
        ([LAYER], IMAGE),
        ([], TEXT),
        ([], IMAGE),
        ([LAYER], TEXT),
    ],
)
def test_a_picture_is_drawn(tmp_path: Path, layers: list[LayerLoad], shown: LoadMap | None) -> None:
    draw_load(loaded(layers, shown), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
