"""How what is set looks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from surgeon.jobs.set import KnobChange, LayerKnobs, SetResult
from surgeon.render.set import set_view
from surgeon.text.plain import plain_text


def test_settings_show_what_changed() -> None:
    same, other = LayerKnobs(0.25, "max", compensated=False), LayerKnobs(0.1, "top_k", compensated=False)
    layers = {"blocks.0.ffn.moe": KnobChange(same, same), "blocks.1.ffn.moe": KnobChange(same, other)}
    lines = plain_text(set_view(SetResult("m", Path("m"), layers)), 120).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "tau", "rule"],
        ["blocks.0.ffn.moe", "0.25", "max"],
        ["blocks.1.ffn.moe", "0.25", "→", "0.1", "max", "→", "top_k"],
        ["Saved", "to", "m."],
    ]
    added = dataclasses.replace(same, compensated=True)
    layers = {"blocks.0.ffn.moe": KnobChange(added, same), "blocks.1.ffn.moe": KnobChange(same, same)}
    lines = plain_text(set_view(SetResult("m", None, layers, ("Gone.",))), 120).splitlines()
    assert lines[0].split() == ["layer", "tau", "rule", "compensated"]
    assert lines[1].split()[-3:] == ["yes", "→", "no"]
    assert lines[2].split()[-1] == "no"
    assert lines[3:] == ["note: Gone."]
