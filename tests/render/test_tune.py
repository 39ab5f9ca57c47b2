"""How a tuned budget looks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from surgeon.data.quality import Change, Quality
from surgeon.jobs.tune import TuningResult
from surgeon.measure.tuning import Tuned
from surgeon.render.tune import tuned_view
from surgeon.text.plain import plain_text


def accuracy(value: float) -> Quality:
    change = Change(value - 0.96, value - 0.98, value - 0.94, 60)
    return Quality("accuracy", value, True, 60, "samples", 60, value - 0.05, value + 0.04, change)


def tuning(quality: tuple[Quality, Quality] | None) -> TuningResult:
    taus = {"blocks.0.ffn.moe": 0.0423, "blocks.1.ffn.moe": 0.5}
    tuned = Tuned(taus, dict.fromkeys(taus, 0.25), 0.4991, 0.01234, 0.1, 0.498, 0.0456, 2)
    return TuningResult("m", Path("m-tuned"), 0.5, "flops", tuned, quality)


def test_tuning_shows_every_tau_and_what_it_gained() -> None:
    lines = plain_text(tuned_view(tuning((accuracy(0.95), accuracy(0.93)))), 160).splitlines()
    rows = [line.split() for line in lines]
    assert rows[1] == ["blocks.0.ffn.moe", "0.0423", "25%"]
    assert rows[2] == ["blocks.1.ffn.moe", "0.5", "25%"]
    assert rows[5] == ["one", "tau,", "0.1", "50%", "0.0456"]
    assert rows[6] == ["a", "tau", "for", "each", "layer", "50%", "0.01234"]
    assert lines[7] == (
        "accuracy: 0.930 [0.880, 0.970] within the budget, 0.950 [0.900, 0.990] at tau 0; "
        "-0.03 [-0.05, -0.01] from the dense model; on 60 samples."
    )
    assert lines[8] == "In brackets: 95% intervals."
    assert lines[9] == "Saved to m-tuned."
    assert "multiply-adds, of dense" in lines[4]
    assert not any("within the budget" in line for line in plain_text(tuned_view(tuning(None)), 120).splitlines())


def test_agreement_is_shown_alone_without_labels() -> None:
    same = Quality("cosine", 0.97, True, 60, "samples", 60, 0.95, 0.99)
    found = dataclasses.replace(tuning((same, same)), agreement=(same,), agreed_with="dense")
    lines = plain_text(tuned_view(found), 120).splitlines()
    assert lines[7] == "agreement with the dense model: cosine 0.970 [0.950, 0.990], on 60 samples"
    assert not any("within the budget" in line for line in lines)


def test_what_was_not_measured_is_told() -> None:
    found = dataclasses.replace(tuning(None), notes=("Quality was not measured: the data has no labels.",))
    lines = plain_text(tuned_view(found), 120).splitlines()
    assert lines[-4:] == [
        "note: Quality was not measured: the data has no labels.", "Saved to m-tuned.", "Next, to time it:",
        "  surgeon bench surgery m-tuned",
    ]  # fmt: skip
