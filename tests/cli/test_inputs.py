"""Commands on a surgery whose linear layers skip inputs, without experts and beside them."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

import surgeon

from .harness import Run, run_surgeon

pytestmark = pytest.mark.usefixtures("traced_once")

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def made(shelf: Path) -> str:
    with contextlib.chdir(shelf):
        words = ("--data", "reviews.csv", "bert", "-o", "skipping")
        result = run_surgeon("apply", "--passes", "sparsify-inputs,lower", *words)
        assert result.code == 0, result.err
        assert "100% of what can be skipped (example inputs, padding counted)" in result.out
        assert "not trained" not in result.out
        assert "surgeon sweep skipping --data reviews.csv" in result.out
    return str(shelf / "skipping")


@pytest.fixture
def skipping(made: str, run: Run) -> str:
    shutil.copytree(made, "mine")
    return "mine"


def test_set_has_no_rule_for_them(run: Run, skipping: str) -> None:
    result = run("set", skipping, "--tau", "*.query:0.5,*:0.25")
    assert result.code == 0, result.err
    assert any(line.split() == [f"{QUERY}.inputs", "0", "→", "0.5"] for line in result.out.splitlines())
    found = run("-q", "set", skipping, "--output", "json").json["layers"]
    assert found[f"{QUERY}.inputs"]["after"] == {"tau": 0.5, "rule": None, "compensated": False}
    assert set(surgeon.get_tau(surgeon.load(skipping)).values()) == {0.25, 0.5}
    for options, words in (
        (("--rule", "top_k"), "The model has no experts, so there is no rule to set."),
        (("--compensate", "--data", "reviews.csv"), "The model has no experts, so there are none to compensate for."),
    ):
        result = run("set", skipping, *options)
        assert result.code == 2
        assert words in result.err


def test_inspect_and_diff_show_them(run: Run, skipping: str) -> None:
    assert run("set", skipping, "--tau", "0.5").code == 0
    result = run("-q", "inspect", skipping)
    assert "14 input-skipping linear layers" in result.out
    found = run("-q", "inspect", skipping, "--output", "json").json["skipping"]
    query = next(one for one in found if one["path"] == f"{QUERY}.inputs")
    assert (query["shape"], query["form"], query["tau"]) == ([16, 16], "dynamic", 0.5)
    assert 0 < query["executed"] < 1
    site = run("-q", "diff", "bert", skipping, "--output", "json").json["sites"][QUERY]
    assert site[0] is None
    assert site[1] == {
        "what": "16 inputs → 16", "parameters": 272, "multiply_adds": 256, "executed": query["executed"],
        "facts": {"kind": "skips-inputs", "d_in": 16, "d_out": 16, "rank": 0},
    }  # fmt: skip


def test_they_are_measured(run: Run, skipping: str, tmp_path: Path) -> None:
    data = ("--data", "reviews.csv")
    result = run("-q", "sweep", skipping, *data, "--tau", "0.5", "-o", "sweep.png")
    assert result.code == 0, result.err
    header = result.out.splitlines()[0]
    assert "ran" in header.split()
    assert "rule" not in header.split()
    assert "router" not in header.split()  # nothing is predicted, so there is no oracle
    result = run("-q", "load", skipping, *data, "--tau", "0.5", "--map-text", "the film was good")
    assert "inputs that ran" in result.out
    result = run("-q", "compare", skipping, "bert-moe", *data, "--tau", "0.5", "--dense", "bert")
    assert result.code == 0, result.err
    result = run("-q", "tune", skipping, *data, "--budget", "0.8", "--samples", "8", "-o", "tuned")
    assert result.code == 0, result.err
    assert any(surgeon.get_tau(surgeon.load("tuned")).values())


def test_bench_surgery_times_them(
    run: Run, skipping: str, small_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # it takes longer than everything else here
    result = run("-q", "bench", "surgery", skipping, "--seconds", "0.0001", "--tau", "0.5", "--output", "json")
    assert result.code == 0, result.err
    stored, half = result.json["times"]["settings"]
    assert stored["executed"] == 1.0
    assert 0 < half["executed"] < 0.9
    result = run("apply", "--passes", "sparsify-inputs", "bert", "--data", "reviews.csv", "-o", "masked-inputs")
    assert "surgeon apply --passes lower masked-inputs" in result.out
    result = run("-q", "bench", "surgery", "masked-inputs", "--seconds", "0.0001", "--output", "json")
    assert any(note.startswith("Layers that are not lowered read everything") for note in result.json["notes"])


def test_export_writes_them_and_their_card(run: Run, skipping: str) -> None:
    assert run("set", skipping, "--tau", "0.25").code == 0
    result = run("-q", "export", skipping, "-o", "hf", "--output", "json")
    assert result.code == 0, result.err
    assert result.json["layers"][QUERY]["what"] == "16 inputs → 16"
    assert result.json["layers"][QUERY]["facts"]["kind"] == "skips-inputs"
    card = Path("hf/README.md").read_text()
    assert "# BertForSequenceClassification that skips inputs" in card
    assert "lets 14 of its linear layers skip" in card
    assert "tau = 0.25" in card
    assert "mixture-of-experts" not in card
    record = surgeon.load(skipping).meta["surgery"]
    assert {(one.path, one.d_in, one.d_out, one.form) for one in record.inputs} >= {
        (f"{QUERY}.inputs", 16, 16, "dynamic")
    }
