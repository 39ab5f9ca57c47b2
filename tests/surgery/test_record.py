"""What a saved surgery tells of itself: its record, its diff and its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.passes import SwapActivation
from surgeon.surgery.artifact import load, load_diff, load_with_inputs
from surgeon.surgery.origin import Origin
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import InputFile, build
from surgeon.surgery.record import RECORD, SCHEMA, read_record
from surgeon.surgery.surgery import Surgery
from tests.small_models import labelled_vectors, stack, vectors
from tests.surgery.forms import FORMS


def test_record(saved: dict[str, Path]) -> None:
    record = json.loads(
        (saved["dynamic"] / RECORD).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert record["schema"] == SCHEMA
    assert set(record["versions"]) == {"surgeon", "torch", "transformers", "python"}
    assert record["input"] == {"path": None, "kind": "module", "sha256": None}
    assert record["recipe"]["seed"] == 5
    assert record["recipe"]["data"]
    assert [one["name"] for one in record["passes"]] == ["moeify", "lower"]
    assert record["passes"][0]["matched"] == ["blocks.0.ffn", "blocks.1.ffn"]
    assert record["experts"] == [
        {"path": f"blocks.{b}.ffn.moe", "experts": 4, "form": "dynamic", "expert_shape": [8, 16], "filling": 0}
        for b in (0, 1)
    ]
    assert record["tau"] == {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.5}
    assert record["trace"]["form"] == "train"


def test_recipe_in_the_record_builds_the_same_passes(saved: dict[str, Path]) -> None:
    steps = read_record(saved["dynamic"]).recipe.passes
    assert build([step.name for step in steps], {step.name: step.options for step in steps}) == FORMS["dynamic"]


def test_the_record_repeats_the_surgery(saved: dict[str, Path]) -> None:
    recipe = read_record(saved["masked"]).recipe
    passes = build([step.name for step in recipe.passes], {step.name: step.options for step in recipe.passes})
    again = Pipeline(passes).run(stack("gelu"), inputs=vectors(), data=labelled_vectors(1), seed=recipe.seed)
    graph = load(saved["masked"])
    for name, value in again.graph.state_dict().items():
        if not name.endswith("tau"):
            assert torch.equal(graph.state_dict()[name], value), name


def test_origin_is_recorded(traces: Any, tmp_path: Path) -> None:
    origin = Origin(path="model.pt2", kind="pt2", sha256="abc")
    surgery = Pipeline([SwapActivation()]).run(traces("stack:gelu"), inputs=vectors(), origin=origin)
    assert read_record(surgery.save(tmp_path / "a")).input == InputFile("model.pt2", "pt2", "abc")


def test_diff_comes_back(surgeries: dict[str, Surgery], saved: dict[str, Path]) -> None:
    assert load_diff(saved["dynamic"]) == surgeries["dynamic"].diff()


def test_inputs_come_back(saved: dict[str, Path]) -> None:
    _, (args, kwargs) = load_with_inputs(saved["dynamic"])
    assert args == ()
    assert set(kwargs) == {"x"}
    assert torch.equal(kwargs["x"], vectors()["x"])
