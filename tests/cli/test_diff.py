"""`surgeon diff`: what was recorded, and two models side by side."""

from __future__ import annotations

import re
from pathlib import Path

from .harness import Run


def test_diff_shows_what_was_recorded(run: Run, shelf: Path) -> None:
    shown = run("diff", "bert-moe").out
    assert shown.rstrip() in (shelf / "apply.txt").read_text()
    assert len(run("diff", "bert-moe", "--stat").out.splitlines()) == 5
    full = run("diff", "bert-moe", "--full").out
    assert "    + bert_encoder_layer_0_moe = bert.encoder.layer.0.moe(" in full
    recorded = run("diff", "bert-moe", "--output", "json").json
    assert [one["report"]["name"] for one in recorded["passes"]] == ["swap-activation", "sparsify", "moeify", "lower"]
    parts = {"removed", "added", "removed_parameters", "added_parameters"}
    assert set(recorded["passes"][0]["graph"]) == parts


def test_diff_puts_two_models_side_by_side(run: Run) -> None:
    args = ("-q", "diff", "nets:gelu", "masked", "--inputs", "nets:inputs")
    result = run(*args)
    assert result.code == 0
    row = r"^blocks\.0…1\.mlp +×2 +FFN 16→64→16 gelu +2 experts × 32 +2\.13 k → 2\.28 k .* - → 100%$"
    assert re.search(row, result.out, re.MULTILINE)
    assert re.search(r"^The outputs differ by \d\.\de-\d\d, relative, on nets:gelu's", result.out, re.MULTILINE)
    found = run(*args, "--full", "--output", "json").json
    assert set(found) == {"names", "costs", "sites", "difference", "note", "nodes"}
    assert found["sites"]["blocks.0.mlp"][1]["what"] == "2 experts × 32"
    assert found["difference"] < 1e-5
    assert any(node["path"] == "blocks.0.mlp.moe" for node in found["nodes"]["added"])


def test_diff_of_unlike_models_says_so(run: Run) -> None:
    result = run("-q", "diff", "masked", "bert-moe", "--stat")
    assert result.code == 0
    assert "The outputs cannot be compared on the first model's example inputs: " in result.out
    assert "bert.encoder" not in result.out
