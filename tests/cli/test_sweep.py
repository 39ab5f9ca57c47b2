"""`surgeon sweep`: quality and cost at each tau."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgeon
from surgeon.graph.snapshot import snapshot
from surgeon.jobs.open_model import open_model
from surgeon.surgery.surgery import Surgery

from .harness import DATA, Run, answer_in

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0")


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_sweep_measures_at_each_tau_and_all_experts_first(run: Run) -> None:
    result = run("sweep", "bert-moe", *REVIEWS, "--tau", "0.5,0.9", "--no-oracle")
    assert result.code == 0, result.err
    header, dense, *rows = table(result.out)
    assert " ".join(header) == "tau accuracy ran converted layers multiply-adds of dense"
    assert (dense[0], dense[-1]) == ("dense", "100%")
    assert [row[0] for row in rows[:3]] == ["0", "0.5", "0.9"]
    assert " ".join(rows[3]).startswith("note: accuracy on 40 samples")
    assert "is not known. Give the model with --dense.\n" in result.out
    assert result.out.rstrip().endswith("Next, to store a tau:\n  surgeon set bert-moe --tau TAU")


def test_the_oracle_is_measured_beside_the_routers(run: Run) -> None:
    found = run("-q", "sweep", "bert-moe", *REVIEWS, "--tau", "0.5,0.9", "--output", "json").json
    assert set(found) == {"model", "data", "task", "dense", "points", "notes"}
    assert [(point["router"], point["tau"]) for point in found["points"]] == [
        (router, tau) for router in ("own", "oracle") for tau in (0.0, 0.5, 0.9)
    ]
    for first, second, third in (found["points"][:3], found["points"][3:]):
        assert first["executed"] == 1.0
        assert first["executed"] > second["executed"] > third["executed"]
        assert third["multiply_adds"] < first["multiply_adds"]
        assert first["relative"] > 1.0  # the routers come on top
        assert first["layers"] > 1.0 > third["layers"]
        assert list(third["shares"]) == list(surgeon.get_tau(surgeon.load("bert-moe")))
        # The layers are of equal cost.
        assert sum(third["shares"].values()) / 2 == pytest.approx(third["executed"])
    assert found["dense"] == {
        "multiply_adds": round(found["points"][0]["multiply_adds"] / found["points"][0]["relative"]),
        "quality": None,
        "milliseconds": None,
    }


def test_rules_are_compared(run: Run) -> None:
    result = run("-q", "sweep", "bert-moe", *REVIEWS, "--tau", "0.5", "--rule", "top_k, energy", "--no-oracle")
    assert result.code == 0, result.err
    header, _, *rows = table(result.out)
    assert header[:2] == ["rule", "tau"]
    assert [row[:2] for row in rows[:4]] == [["top_k", "0"], ["top_k", "0.5"], ["energy", "0"], ["energy", "0.5"]]
    assert "50%" in rows[1]


def test_the_dense_model_is_measured_beside_it(run: Run) -> None:
    args = ("-q", "sweep", "bert-moe", *REVIEWS, "--tau", "0.5", "--no-oracle", "--dense", "bert", "--time")
    found = run(*args, "--output", "json").json
    assert found["dense"]["quality"]["items"] == 40
    assert found["dense"]["milliseconds"] > 0
    assert all(point["milliseconds"] > 0 for point in found["points"])
    shown = run(*args).out
    assert "--dense" not in shown
    assert table(shown)[0][-1] == "ms"


def test_tables_and_plots_are_written(run: Run, tmp_path: Path) -> None:
    args = ("sweep", "bert-moe", *REVIEWS, "--tau", "0.5", "-o", "table.json", "-o", "curve.png")
    result = run(*args, "--output", "json")
    assert result.code == 0, result.err
    assert answer_in((tmp_path / "table.json").read_text()) == result.json
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Written to table.json." in result.err
    assert "Written to curve.png." in result.err


def test_files_that_cannot_be_written_are_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    for name, code, words in (
        ("table.csv", 2, "Cannot write table.csv: give a name that ends in .json (numbers), .png (a picture),"),
        ("nowhere/table.json", 4, "Cannot write nowhere/table.json: nowhere does not exist or cannot be written to"),
        ("dir.png", 4, "Cannot write dir.png: it is a directory."),
    ):
        result = run("sweep", "does-not-exist", *REVIEWS, "-o", name)
        assert (result.code, result.out) == (code, "")
        assert words in result.err


def test_values_stored_for_each_layer_are_measured_too(run: Run, tmp_path: Path) -> None:
    opened = open_model("bert-moe")
    graph = opened.graph
    first, second = surgeon.get_tau(graph)
    surgeon.set_tau(graph, {first: 0.9, second: 0.0})
    surgeon.set_rule(graph, "top_k", first)
    Surgery(graph, [], opened.inputs, [snapshot(graph)], origin=opened.origin).save(tmp_path / "mixed")
    found = run("-q", "sweep", "mixed", *REVIEWS, "--tau", "0.5", "--no-oracle", "--output", "json").json
    assert [point["tau"] for point in found["points"]] == [0.0, 0.5, None]
    stored = found["points"][2]
    assert stored["rule"] == "top_k max"
    assert stored["executed"] == 0.5 * (0.25 + 1.0)
    args = ("-q", "sweep", "mixed", *REVIEWS, "--tau", "0.5", "--no-oracle", "--rule", "max,energy")
    points = run(*args, "--output", "json").json["points"]
    own = [point for point in points if point["tau"] is None]
    assert [point["rule"] for point in own] == ["top_k max"]  # as it is stored, not under other rules
    assert len(points) == 2 * 2 + 1
    assert "as stored" in run("-q", "sweep", "mixed", *REVIEWS, "--tau", "0.5", "-o", "mixed.png").out


def test_a_stored_setting_is_measured_beside_other_rules(run: Run) -> None:
    assert run("set", "bert-moe", "--tau", "0.5", "--rule", "energy", "-o", "mine").code == 0
    args = ("-q", "sweep", "mine", *REVIEWS, "--tau", "0.5", "--no-oracle", "--output", "json")
    for rules, found in (("top_k", [("top_k", 0.0), ("top_k", 0.5), ("energy", None)]),
                         ("energy", [("energy", 0.0), ("energy", 0.5)])):  # fmt: skip
        points = run(*args, "--rule", rules).json["points"]
        assert [(point["rule"], point["tau"]) for point in points] == found


def test_by_default_every_rule_is_swept_at_values_that_suit_it(run: Run) -> None:
    usual, skipped = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5], [0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert run("set", "bert-moe", "--tau", "0.9", "--rule", "top_k", "-o", "mine").code == 0
    args = ("-q", "sweep", "mine", *REVIEWS, "--no-oracle", "--output", "json")
    for rules, found in (((), [*skipped]), (("--rule", "max,top_k"), [*usual, *skipped]),
                         (("--rule", "max"), [*usual, None])):  # fmt: skip
        assert [point["tau"] for point in run(*args, *rules).json["points"]] == found


def test_wrong_settings_exit_with_2(run: Run) -> None:
    for options, words in (
        (("--rule", "best"), "No selection rule 'best'. There are: max, cumulative, energy, top_k."),
        (("--tau", "0.5,x"), "--tau 0.5,x: give numbers from 0 to 1"),
    ):
        result = run("sweep", "bert-moe", *REVIEWS, *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_sweep_needs_experts(run: Run) -> None:
    result = run("-q", "sweep", "nets:gelu", *DATA)
    assert result.code == 2
    assert "The model has no layers that skip, so tau changes nothing. Apply moeify, sparsify-inputs or " in result.err


def test_layers_are_swept_one_at_a_time(run: Run, tmp_path: Path) -> None:
    result = run("sweep", "bert-moe", *REVIEWS, "--tau", "0.9", "--each-layer", "-o", "layers.png")
    assert result.code == 0, result.err
    header, _, everything, *rows = table(result.out)
    paths = list(surgeon.get_tau(surgeon.load("bert-moe")))
    points = run("-q", "sweep", "bert-moe", *REVIEWS, "--tau", "0.9", "--each-layer", "--output", "json").json["points"]
    shares = [point["shares"][point["layer"]] for point in points[1:]]
    assert [float(row[-5].rstrip("%")) for row in rows[: len(paths)]] == pytest.approx(
        [100 * s for s in shares], abs=0.6
    )
    assert header[:2] == ["layer", "tau"]
    assert everything[:2] == ["0", "(everything)"]
    assert [row[:2] for row in rows[: len(paths)]] == [[path, "0.9"] for path in paths]
    assert "One layer at a time has a tau" in result.out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
