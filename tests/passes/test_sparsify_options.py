"""sparsify's options: the other penalty, targets for each layer, a teacher, and what it reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph, aten, fork, is_call
from surgeon.measure.meter import measure
from surgeon.passes import Moeify, Sparsify
from surgeon.passes.report import PassReport
from surgeon.surgery.artifact import load_diff
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import build
from surgeon.training.loop import FitReport, RunSettings
from surgeon.training.penalty import AlphaControl, Sparsity
from tests.small_models import classifier, labelled_vectors, stack, tokens, vectors

DATA = labelled_vectors(4)


def fitted(graph: TracedGraph, data: Any = None, settings: RunSettings | None = None, **options: Any) -> FitReport:
    report = Sparsify(**options).apply(graph, data=DATA if data is None else data, settings=settings)
    assert report.fit is not None
    return report.fit


def active(fit: FitReport) -> dict[str, tuple[float, float]]:
    return {path: (1 - old.below_100th, 1 - new.below_100th) for path, (old, new) in fit.sparsity.items()}


# --- penalties --------------------------------------------------------------------------------------------------------


def test_l1_is_penalised_and_shown() -> None:
    inputs = tokens(padded=False)
    graph = surgeon.trace(classifier("relu", layers=2, dropout=0.0), inputs)
    names = [node.name for node in graph.graph.nodes if is_call(node, aten.relu.default)]
    with torch.no_grad():
        _, values = Capture(graph, names)(**inputs)
    want = sum(float(value.sum(-1).mean()) for value in values.values()) / 2
    data = [(inputs, torch.tensor([0, 1, 2]))]
    first = fitted(graph, data, steps=1, lr=1e-9, penalty="l1").losses[0][1]
    assert set(first) == {"task loss", "L1", "active"}
    assert first["L1"] == pytest.approx(want, rel=1e-5)


def test_l1_makes_it_sparse(traces: Any) -> None:
    graph = traces("stack:relu")
    settings: dict[str, Any] = {"penalty": "l1", "epochs": 20, "lr": 3e-3, "schedule": "constant"}
    with_it = fitted(fork(graph), alpha=0.1, alpha_schedule="constant", **settings)
    without = fitted(fork(graph), alpha=0.0, alpha_schedule="constant", **settings)
    assert with_it.losses[-1][1]["L1"] < 0.3 * without.losses[-1][1]["L1"]
    assert with_it.losses[-1][1]["active"] < without.losses[-1][1]["active"]


# --- targets ----------------------------------------------------------------------------------------------------------


def near(value: float, wanted: float) -> bool:
    return wanted / 1.5 < value < wanted * 1.5


def test_every_layer_comes_near_one_target() -> None:
    fit = fitted(surgeon.trace(stack("relu"), vectors()), steps=300, target=0.12, lr=3e-3)
    assert set(fit.sparsity) == {"blocks.0.ffn", "blocks.1.ffn"}
    for before, after in active(fit).values():
        assert before > 0.4
        assert near(after, 0.12)
    assert fit.losses[-1][1]["active"] == pytest.approx(sum(after for _, after in active(fit).values()) / 2, abs=0.04)


def test_layers_come_near_targets_of_their_own(traces: Any) -> None:
    (one,) = build(["sparsify"], {"sparsify": {"steps": "300", "lr": "3e-3", "target": "*.0.*:0.25,*:0.06"}})
    report = one.apply(traces("stack:relu"), data=DATA)
    assert report.fit is not None
    found = active(report.fit)
    assert near(found["blocks.0.ffn"][1], 0.25)
    assert near(found["blocks.1.ffn"][1], 0.06)
    assert report.options["target"] == {"*.0.*": 0.25, "*": 0.06}


def test_a_target_that_was_missed_is_named(traces: Any) -> None:
    def note(**options: Any) -> tuple[str, ...]:
        return Sparsify(lr=3e-3, **options).apply(traces("stack:relu"), inputs=vectors(), data=DATA).notes

    missed, *_ = note(steps=1, target={"*.0.*": 0.01, "*": 0.9})
    assert re.match(r"1 of 2 layers missed the target. The worst is blocks.0.ffn with \d\d\.\d% .* of 1\.0%\. ", missed)
    both, *_ = note(steps=1, target={"*.0.*": 0.1, "*": 0.01})
    assert "2 of 2 layers missed the target. The worst is blocks.1.ffn" in both
    assert note(steps=1, target=0.9) == ()


@pytest.mark.parametrize(("penalty", "rose"), [("hoyer", "square Hoyer"), ("l1", "L1")])
def test_it_warns_if_activity_does_not_fall(traces: Any, penalty: Any, rose: str) -> None:
    def trained(**options: Any) -> PassReport:
        one = Sparsify(penalty=penalty, alpha_schedule="constant", lr=3e-3, **options)
        return Pipeline([one]).run(traces("stack:relu"), inputs=vectors(), data=DATA).reports[0]

    weak = trained(alpha=1e-9, epochs=20)
    assert weak.fit is not None
    assert weak.fit.penalty is not None
    before, after = weak.fit.penalty
    assert after > before
    shares = [f"{sum(share) / 2:.1%}" for share in zip(*active(weak.fit).values(), strict=True)]
    (note,) = weak.notes
    assert note == (
        f"The share of active neurons rose from {shares[0]} to {shares[1]}. The {rose} penalty rose from {before:.4g} "
        f"to {after:.4g}. Try a larger alpha (now 1e-09), more epochs or steps, or set a target, for example "
        "target=0.05."
    )
    strong = trained(alpha=0.1, epochs=20)
    assert strong.fit is not None
    assert strong.fit.penalty is not None
    assert strong.fit.penalty[1] < strong.fit.penalty[0] == pytest.approx(before)
    assert strong.notes == ()
    assert trained(alpha=0.0, steps=1).notes == ()  # nothing was to fall


def test_a_layer_without_a_target_is_left_about_as_active(traces: Any) -> None:
    fit = fitted(traces("stack:relu"), steps=300, lr=3e-3, target={"*.0.*": 0.1})
    found = active(fit)
    assert near(found["blocks.0.ffn"][1], 0.1)
    assert found["blocks.1.ffn"][1] > 0.6 * found["blocks.1.ffn"][0]


def test_a_layer_without_a_target_is_not_penalised(traces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    original = AlphaControl.alphas.fget
    assert original is not None

    def alphas(self: AlphaControl) -> torch.Tensor:
        weights.append(original(self))
        return weights[-1]

    monkeypatch.setattr(AlphaControl, "alphas", property(alphas))
    fitted(traces("stack:relu"), steps=3, lr=1e-3, target={"*.1.*": 0.1})
    assert len(weights) == 3
    assert all(float(first) == 0 < float(second) for first, second in weights)


# --- the report -------------------------------------------------------------------------------------------------------


def test_sparsity_is_reported_before_and_after_and_comes_back_from_json(traces: Any, tmp_path: Path) -> None:
    graph = traces("stack:relu")
    surgery = Pipeline([Sparsify(steps=3)]).run(graph, inputs=vectors(), data=DATA)
    fit = surgery.reports[0].fit
    assert fit is not None
    before, after = fit.sparsity["blocks.0.ffn"]
    assert 0 < before.zero < 1
    assert before.zero <= before.below_1000th <= before.below_100th <= before.below_10th < 1
    assert before != after
    assert PassReport.from_dict(json.loads(json.dumps(surgery.reports[0].to_dict()))) == surgery.reports[0]
    saved = load_diff(surgery.save(tmp_path / "saved"))
    assert saved.passes[0].report.fit == fit


def test_sparsity_is_that_of_the_activation_and_not_of_what_is_penalised(traces: Any) -> None:
    """GELU's penalised values are shifted by 10 and never small."""
    fit = fitted(traces("stack:gelu"), steps=1, lr=1e-9)
    before, _ = fit.sparsity["blocks.0.ffn"]
    assert before.zero < 0.01
    assert 0 < before.below_10th < 0.9


def test_a_layer_that_runs_twice_is_reported_with_both_executions(traces: Any) -> None:
    graph = traces("stack:shared")
    names = [node.name for node in graph.graph.nodes if is_call(node, aten.relu.default)]
    assert len(names) == 2
    with torch.no_grad():
        values = [Capture(graph.eval(), names)(**inputs)[1] for inputs, _ in DATA]
    both = torch.cat([one[name].flatten(0, -2) for name in names for one in values])
    last = torch.cat([one[names[-1]].flatten(0, -2) for one in values])
    found = fitted(graph, steps=1, lr=1e-9).sparsity
    assert [before for before, _ in found.values()] == [Sparsity.of(both)]
    assert Sparsity.of(both) != Sparsity.of(last)


def test_layers_tapped_before_are_left_to_the_sparsify_that_tapped_them(traces: Any) -> None:
    graph = fork(traces("stack:relu"))
    first, second = (Sparsify(steps=1, lr=1e-9, only=(only,)) for only in ("blocks.0.*", "blocks.1.*"))
    alone = second.apply(fork(graph), data=DATA).fit
    first.apply(graph, data=DATA)
    after = second.apply(graph, data=DATA).fit
    assert alone is not None
    assert after is not None
    assert set(after.sparsity) == {"blocks.1.ffn"}
    assert after.losses[0][1]["square Hoyer"] == pytest.approx(alone.losses[0][1]["square Hoyer"], rel=0.05)


def test_padding_takes_no_part_in_the_report() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    padded = tokens(1, 7, padded=False)
    padded["attention_mask"][0, 4:] = 0
    short = {name: value[:, :4] for name, value in padded.items()}
    one, two = (
        fitted(fork(graph), data=Data.of([(inputs, torch.tensor([1]))], task="classification"), steps=1, lr=1e-9)
        for inputs in (padded, short)
    )
    assert one.sparsity["blocks.0.ffn"][0] == two.sparsity["blocks.0.ffn"][0]


# --- resuming ---------------------------------------------------------------------------------------------------------


class Stops(list):  # type: ignore[type-arg]
    """Data that is interrupted in one of the passes through it."""

    begun, stop = 0, 0

    def __iter__(self) -> Any:
        self.begun += 1
        for index, batch in enumerate(super().__iter__()):
            if self.begun == self.stop and index == 2:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(("accumulate", "done"), [(1, 6), (4, 1)])
def test_a_run_with_targets_can_be_resumed(tmp_path: Path, accumulate: int, done: int) -> None:
    """It is interrupted after six batches."""
    one = Sparsify(steps=20, target=0.1, lr=3e-3, accumulate=accumulate)
    results = {}
    for name in ("whole", "resumed"):
        torch.manual_seed(0)
        graph = surgeon.trace(stack("relu"), vectors())
        place = tmp_path / name
        data = Stops(DATA)
        if name == "resumed":
            data.stop = 4  # in the second epoch: before training, the report and the loss look at the data
            with pytest.raises(KeyboardInterrupt):
                one.apply(fork(graph), data=Data.of(data), settings=RunSettings(workdir=place))
            data = Stops(DATA)
        report = one.apply(graph, data=Data.of(data), settings=RunSettings(workdir=place, resume=name == "resumed"))
        assert report.fit is not None
        assert report.fit.resumed_at == (done if name == "resumed" else 0)
        results[name] = {key: value.clone() for key, value in graph.state_dict().items()}
    for key, value in results["whole"].items():
        assert torch.equal(value, results["resumed"][key]), key


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"penalty": "l2"}, "penalty is 'l2', but must be one of hoyer, l1"),
    ({"target": 0.0}, "target is 0.0, but must be above 0 and below 1"),
    ({"target": {"a": 0.5, "b": 1.5}}, "target is 1.5, but must be above 0 and below 1"),
    ({"target": 0.1, "alpha_schedule": "constant"}, "with a target the weight adapts automatically"),
    ({"target": 0.1, "alpha": 0.0}, "with a target, alpha is the initial weight and must be above 0"),
    ({"distill": 1.5}, "distill is 1.5, but must be from 0 to 1"),
    ({"distill": -0.5}, "distill is -0.5"),
])  # fmt: skip
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"sparsify: {words}"):
        Sparsify(**options)


def test_the_sparser_model_needs_fewer_experts(traces: Any) -> None:
    """What sparsity is for: at one tau the sparse model runs fewer experts than the dense one."""
    shares = {}
    for target in (None, 0.08):
        sparsify = [] if target is None else [Sparsify(steps=200, target=target, lr=3e-3)]
        passes = [*sparsify, Moeify(experts=16, steps=120, lr=1e-2, tau=0.2)]
        surgery = Pipeline(passes).run(traces("stack:relu"), inputs=vectors(), data=DATA)
        cost = measure(surgery.graph.eval(), (), vectors())[0]
        shares[target] = cost.executed
    assert shares[0.08] < 0.8 * shares[None]
