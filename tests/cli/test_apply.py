"""`surgeon apply`: what it shows, trains, measures and saves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import surgeon

from .harness import DATA, NET, Run, left, recorded

pytestmark = pytest.mark.usefixtures("traced_once")


def test_apply_shows_each_pass_the_total_and_what_comes_next(shelf: Path) -> None:
    out = (shelf / "apply.txt").read_text()
    heads = [line for line in out.splitlines() if re.match(r"^(swap-activation|sparsify|moeify|lower)  \d", line)]
    assert [head.split("  ")[:2] for head in heads] == [
        ["swap-activation", "2 of 3 sites"], ["sparsify", "2 of 3 sites"], ["moeify", "2 of 3 sites"],
        ["lower", "2 of 2 sites"],
    ]  # fmt: skip
    assert "bert.encoder.layer.0…1  ×2  FFN 16→32→16 relu → 4 experts × 8, router 8" in out
    assert "note: The routers were not trained: every expert runs and the output is unchanged." in out
    assert re.search(r"^Saved to bert-moe in ", out, re.MULTILINE)
    assert out.rstrip().endswith(
        "surgeon apply --passes swap-activation,sparsify,moeify,lower --set moeify.experts=4 bert -o bert-moe "
        "--data DATA --overwrite"
    )


def test_apply_saves_what_can_be_loaded(shelf: Path, run: Run) -> None:
    record = recorded(shelf / "bert-moe")
    assert [step["name"] for step in record["recipe"]["passes"]] == ["swap-activation", "sparsify", "moeify", "lower"]
    assert record["input"]["path"] == "bert"
    assert (shelf / "bert-moe/tokenizer.json").exists()
    assert set(surgeon.get_tau(surgeon.load(shelf / "bert-moe")).values()) == {0.0}


def test_apply_trains_measures_and_sets_tau(run: Run, tmp_path: Path) -> None:
    result = run(
        "apply", "--passes", "swap-activation,sparsify,moeify,lower", "bert", "--data", "reviews.csv", "--tau", "0.5",
        "--set", "sparsify.steps=3", "--set", "moeify.steps=6", "--eval-fraction", "0.25", "--limit", "32",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "trained 3 steps in" in result.out
    assert "router loss" in result.out
    number = r"0\.\d+ \[0\.\d+, 0\.\d+\]"
    assert re.search(rf"^accuracy +{number} +{number} +\S+ \[\S+, \S+\] on 8 samples$", result.out, re.MULTILINE)
    agreement = r"top-1 agreement \d\.\d+ \[.+\], KL divergence \S+ \[.+\], on 8 samples"
    assert re.search(rf"^agreement with the model before: {agreement}$", result.out, re.MULTILINE)
    assert re.search(
        r"^  that ran .* of what can be skipped \(example inputs, padding counted\)$", result.out, re.MULTILINE
    )
    assert result.out.rstrip().endswith("surgeon sweep bert-surgery --data reviews.csv --limit 32 --eval-fraction 0.25")
    assert re.search(r"^moeify routers  6/6  router loss", result.err, re.MULTILINE)
    assert left(tmp_path) == {"bert-surgery"}
    assert set(surgeon.get_tau(surgeon.load("bert-surgery")).values()) == {0.5}


def test_tau_is_for_routers_that_were_fitted(run: Run, tmp_path: Path) -> None:
    """Those of a surgery without data were not; a dry run fits none and leaves tau alone."""
    refused = run("apply", "--passes", "lower", "masked", "--tau", "0.5", "-o", "out")
    assert refused.code == 2
    assert "--tau needs fitted routers, but this surgery has none. Run moeify again, with --data." in refused.err
    dry = run("apply", "--passes", "moeify,lower", *NET, *DATA, "--tau", "0.5", "--dry-run")
    assert dry.code == 0, dry.err
    assert "tau was not set, because a dry run fits no routers." in dry.out
    assert "100% of what can be skipped (" in dry.out
    assert left(tmp_path) == set()
    fitted = run("apply", "--passes", "moeify", "--set", "moeify.epochs=0", *NET, *DATA, "-o", "fitted")
    assert fitted.code == 0, fitted.err
    assert run("apply", "--passes", "lower", "fitted", "--tau", "0.5", "-o", "low").code == 0
    assert set(surgeon.get_tau(surgeon.load("low")).values()) == {0.5}


def test_apply_json_is_alone_on_stdout(run: Run) -> None:
    result = run("--output", "json", "apply", "--passes", "moeify", *NET, "-o", "out", "--verify", "full")
    done = result.json
    assert set(done) == {
        "model", "directory", "dry_run", "search", "passes", "before", "after", "quality", "agreement", "notes", "next",
        "seconds", "report",
    }  # fmt: skip
    assert done["directory"] == "out"
    assert done["passes"][0]["matched"] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert done["passes"][0]["max_error"] < 1e-4
    assert "tracing Net ..." in result.err


def test_dry_run_changes_shows_and_saves_nothing(run: Run, tmp_path: Path) -> None:
    result = run("apply", "--passes", "mlpify,moeify,lower", *NET, "--dry-run", *DATA)
    assert result.code == 0, result.err
    assert "mlpify  2 of 3 sites" in result.out
    assert "nothing was trained and nothing was saved" in result.out
    assert result.out.rstrip().endswith(f"surgeon apply --passes mlpify,moeify,lower {' '.join((*NET, *DATA))}")
    assert left(tmp_path) == set()


def test_dry_run_without_data_that_is_needed_asks_for_it(run: Run) -> None:
    result = run("apply", "--passes", "mlpify,moeify", *NET, "--dry-run")
    assert result.code == 0, result.err
    assert result.out.rstrip().endswith(f"surgeon apply --passes mlpify,moeify {' '.join(NET)} --data DATA")


def test_a_saved_surgery_can_be_gone_on_with(run: Run, tmp_path: Path) -> None:
    result = run("apply", "--passes", "lower", "masked")
    assert result.code == 0, result.err
    assert left(tmp_path) == {"masked-lower"}
    assert result.out.rstrip().endswith("surgeon sweep masked-lower --data DATA")
    assert {site.form for site in surgeon.find_moes(surgeon.load("masked-lower"))} == {"dynamic"}
    x = torch.randn(3, 4, 16)
    import nets

    with torch.no_grad():
        assert torch.allclose(surgeon.load("masked-lower")(x), nets.gelu().eval()(x), atol=1e-5)


def test_a_recipe_can_be_run_again(run: Run, tmp_path: Path) -> None:
    options = {"experts": 8, "only": ["blocks.1.*"]}
    (tmp_path / "r.yaml").write_text(json.dumps({"passes": [{"moeify": options}], "seed": 3}))
    assert run("-q", "apply", "--recipe", "r.yaml", *NET, "-o", "again").code == 0
    made = recorded(Path("again"))["recipe"]
    assert made["passes"] == [{"name": "moeify", "options": options}]
    assert made["seed"] == 3
    assert run("-q", "apply", "--recipe", "masked", *NET, "--dry-run").code == 0


def test_quality_that_cannot_be_measured_is_said(run: Run) -> None:
    result = run("-q", "apply", "--passes", "moeify", *NET, *DATA, "--set", "moeify.steps=1")
    assert "note: Quality was not measured: no data was held out for it." in result.out


def test_example_inputs_are_taken_from_the_data(run: Run) -> None:
    result = run("apply", "--passes", "moeify", "nets:gelu", *DATA, "--set", "moeify.steps=1")
    assert result.code == 0, result.err
    assert "note: The example inputs are two rows of the data." in result.err
