"""The training loop: learns, follows its schedule, stops at nonsense, ignores padding, and continues where it was."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.errors import DataError, LoadError, PassError, SaveError, UsageError
from surgeon.passes import Sparsify
from surgeon.progress import Progress
from surgeon.tracing.trace import TraceInfo
from surgeon.training import loop
from surgeon.training.loop import FitReport, Precision, RunSettings, TrainingPlan, fit, loss_of
from tests.small_models import labelled

PLAN = TrainingPlan(epochs=5, steps=None, lr=0.05)


def regression(batches: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(8, 4, generator=generator) for _ in range(batches)]
    return [(x, x @ torch.arange(4.0).unsqueeze(1)) for x in xs]


class Problem:
    """A linear layer to fit, with what was seen on the way."""

    key, label = "the-fit", "the fit"

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[tuple[float, float]] = []
        self.progress: list[Progress] = []

    def loss(self, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        assert batch.labels is not None
        value = (self.layer(self.dropout(batch.args[0])) - batch.labels).square().mean()
        self.seen.append((float(batch.args[0].sum()), done))
        return value, {"loss": value.item()}

    def fit(self, data: Any, plan: TrainingPlan = PLAN, **settings: Any) -> FitReport:
        torch.manual_seed(1)
        settings.setdefault("progress", self.progress.append)
        parameters = list(self.layer.parameters())
        return fit(parameters, self.loss, Data.of(data), plan, RunSettings(**settings), self.key, label=self.label)


def test_learns_and_reports() -> None:
    problem = Problem()
    report = problem.fit(regression(), TrainingPlan(epochs=30, steps=None, lr=0.1))
    assert report.steps == 180
    assert report.epochs == 30
    assert report.resumed_at == 0
    assert report.losses[0][0] == 1
    assert report.losses[-1][0] == 180
    assert report.losses[-1][1]["loss"] < 0.01 * report.losses[0][1]["loss"]
    assert len(report.losses) <= 22
    assert [moment.done for moment in problem.progress] == list(range(1, 181))
    assert {(moment.what, moment.total) for moment in problem.progress} == {("the fit", 180)}
    assert problem.progress[-1].values == report.losses[-1][1]


def test_sees_every_batch_of_every_epoch_and_how_far_it_is() -> None:
    problem, data = Problem(), regression(3)
    problem.fit(data, TrainingPlan(epochs=2, steps=None, lr=0.0))
    sums = [float(x.sum()) for x, _ in data]
    assert [value for value, _ in problem.seen] == pytest.approx(sums * 2)
    assert [done for _, done in problem.seen] == pytest.approx([step / 6 for step in range(6)])


def test_a_parameter_with_its_own_rate_keeps_it_all_along() -> None:
    problem, data = Problem(), Data.of(regression())
    weight, bias = problem.layer.weight, problem.layer.bias
    before = weight.detach().clone(), bias.detach().clone()
    fit([weight, bias], problem.loss, data, PLAN, RunSettings(), "the-fit", own_rates={bias: 0.0})
    assert torch.equal(bias, before[1])
    assert float((weight.detach() - before[0]).abs().max()) > 0.1


def test_beta2_is_that_of_the_optimizer() -> None:
    data, torch_model = regression(), Problem()
    problem = Problem()
    problem.fit(data, replace(PLAN, beta2=0.5, schedule="constant", clip=None, steps=4, weight_decay=0.0))
    optimizer = torch.optim.AdamW(torch_model.layer.parameters(), lr=PLAN.lr, betas=(0.9, 0.5), weight_decay=0.0)
    for x, y in data[:4]:
        optimizer.zero_grad()
        (torch_model.layer(x) - y).square().mean().backward()
        optimizer.step()
    assert torch.allclose(problem.layer.weight, torch_model.layer.weight, atol=1e-6)


def test_steps_overrule_epochs() -> None:
    assert Problem().fit(regression(3), TrainingPlan(epochs=100, steps=4, lr=0.1)).steps == 4


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (0.01, 1), (1.0, 6)])
def test_part_of_an_epoch(epochs: float, steps: int) -> None:
    assert Problem().fit(regression(6), TrainingPlan(epochs=epochs, steps=None, lr=0.1)).steps == steps


@pytest.mark.parametrize(
    ("schedule", "rates"), [("constant", (1.0, 1.0)), ("linear", (2 / 3, 1 / 3)), ("cosine", (0.75, 0.25))]
)
def test_learning_rate_after_a_third_and_two_thirds(schedule: Any, rates: tuple[float, float]) -> None:
    problem, weights = Problem(), []

    def note(moment: Progress) -> None:
        weights.append(problem.layer.weight.detach().clone())

    lr = 1e-4  # so small that the gradient stays what it was: then Adam moves every weight by the rate
    problem.fit([regression(1)[0]] * 3, TrainingPlan(epochs=1, steps=None, lr=lr, schedule=schedule), progress=note)
    moves = [float((after - before).abs().mean()) / lr for before, after in itertools.pairwise(weights)]
    assert moves == pytest.approx(rates, rel=0.05)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", (0, 0.5, 1, 1, 1, 1)), ("linear", (0, 0.5, 1, 0.75, 0.5, 0.25)),
     ("cosine", (0, 0.5, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4))],
)  # fmt: skip
def test_learning_rate_rises_first_and_then_follows_its_schedule(schedule: Any, rates: tuple[float, ...]) -> None:
    plan = TrainingPlan(epochs=1, steps=None, lr=1.0, schedule=schedule, warmup=1 / 3)
    assert [plan.rate(step / 6) for step in range(6)] == pytest.approx(rates)
    problem = Problem()
    start = problem.layer.weight.clone()
    problem.fit([regression(1)[0]] * 3, TrainingPlan(epochs=1, steps=1, lr=1.0, schedule=schedule, warmup=0.5))
    assert torch.equal(problem.layer.weight, start)


def test_a_step_takes_the_mean_of_the_batches_that_it_accumulates() -> None:
    """Halves of batches, two for a step, are the batches."""
    data = regression(6)
    halves = [(part_x, part_y) for x, y in data for part_x, part_y in zip(x.split(4), y.split(4), strict=True)]
    one, other = Problem(), Problem()
    want = one.fit(data, TrainingPlan(epochs=5, steps=None, lr=0.05))
    found = other.fit(halves, TrainingPlan(epochs=5, steps=None, lr=0.05, accumulate=2))
    assert (found.steps, found.epochs) == (want.steps, want.epochs) == (30, 5)
    assert torch.allclose(other.layer.weight, one.layer.weight, atol=1e-6)
    assert found.losses[-1][1]["loss"] == pytest.approx(want.losses[-1][1]["loss"], rel=1e-4)
    assert [done for _, done in other.seen] == pytest.approx([part / 60 for part in range(60)])


@pytest.mark.parametrize(("plan", "steps", "batches"), [
    (TrainingPlan(epochs=1, steps=None, lr=0.1, accumulate=4), 2, 8),  # the nearest to the six there are
    (TrainingPlan(epochs=0.1, steps=None, lr=0.1, accumulate=4), 1, 4),
    (TrainingPlan(epochs=1, steps=3, lr=0.1, accumulate=4), 3, 12),
])  # fmt: skip
def test_epochs_count_data_and_steps_those_of_the_optimiser(plan: TrainingPlan, steps: int, batches: int) -> None:
    problem = Problem()
    report = problem.fit(regression(6), plan)
    assert (report.steps, report.epochs) == (steps, round(batches / 6, 3))
    assert len(problem.seen) == batches
    assert len(problem.progress) == steps


def test_bfloat16_is_what_the_loss_is_computed_in_and_not_what_weights_are_stored_in() -> None:
    types = set()

    class Watched(Problem):
        def loss(self, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            with torch.no_grad():  # a cast that records no gradient must not be used where one is wanted
                types.add(self.layer(batch.args[0]).dtype)
            return super().loss(batch, done)

    problem = Watched()
    report = problem.fit(regression(), TrainingPlan(epochs=30, steps=None, lr=0.1, precision="bfloat16"))
    assert types == {torch.bfloat16}
    assert problem.layer.weight.dtype == torch.float32
    assert report.losses[-1][1]["loss"] < 0.01 * report.losses[0][1]["loss"]
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_are_clipped() -> None:
    sizes = []
    for clip in (None, 1e-3):
        problem = Problem()
        original = torch.optim.AdamW.step
        recorded: list[float] = []

        def step(self: Any, *args: Any, recorded: list[float] = recorded, original: Any = original) -> Any:
            recorded.append(max(float(p.grad.norm()) for group in self.param_groups for p in group["params"]))
            return original(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            problem.fit(regression(2), TrainingPlan(epochs=1, steps=None, lr=1e-3, clip=clip))
        sizes.append(recorded[0])
    assert sizes[0] > 1e-3 >= sizes[1]


def test_everything_else_is_left_as_it_was() -> None:
    problem = Problem()
    problem.layer.weight.requires_grad_(False)
    state = [p.requires_grad for p in problem.layer.parameters()]
    before = problem.layer.weight.clone()
    problem.fit(regression())
    assert [p.requires_grad for p in problem.layer.parameters()] == state
    assert all(p.grad is None for p in problem.layer.parameters())
    assert not torch.equal(problem.layer.weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops(bad: float, precision: Precision) -> None:
    problem = Problem()
    data = regression(3)
    data[1] = (data[1][0], data[1][1] * bad)
    with pytest.raises(
        PassError, match=r"the fit: the loss is (nan|inf) at step 2 of 15.*smaller learning rate \(now 0.05\)"
    ):
        problem.fit(data, replace(PLAN, precision=precision))
    assert torch.isfinite(problem.layer.weight).all()
    assert all(p.requires_grad and p.grad is None for p in problem.layer.parameters())


class Endless:
    """Batches that can be read again and again, and nobody knows how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from regression(3)


def test_unknown_length_needs_steps() -> None:
    with pytest.raises(DataError, match=r"no length.*`steps`"):
        Problem().fit(Endless())
    report = Problem().fit(Endless(), TrainingPlan(epochs=1, steps=7, lr=0.1))
    assert report.steps == 7


def test_report_of_data_without_length_is_json() -> None:
    report = Problem().fit(Endless(), TrainingPlan(epochs=1, steps=2, lr=0.1))
    json.dumps(vars(report), allow_nan=False)


def test_empty_data() -> None:
    with pytest.raises(DataError):
        Problem().fit([], TrainingPlan(epochs=1, steps=3, lr=0.1))


@pytest.mark.parametrize("option", [
    {"steps": 0}, {"epochs": 0.0}, {"lr": -1.0}, {"warmup": 1.0}, {"warmup": -0.1}, {"accumulate": 0},
    {"precision": "float16"},
])  # fmt: skip
def test_training_that_cannot_be_is_refused(option: Any) -> None:
    (name,) = option
    with pytest.raises(UsageError, match=f"sparsify: {name} is"):
        Sparsify(**option)


# --- interrupted and resumed ------------------------------------------------------------------------------------------


def interrupt_at(step: int) -> Any:
    def progress(moment: Progress) -> None:
        if moment.done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("step", [1, 7, 12])
def test_resumed_fit_ends_as_an_uninterrupted_one(tmp_path: Path, step: int, dropout: float) -> None:
    whole = Problem(dropout)
    want = whole.fit(regression(6), workdir=tmp_path / "whole")

    broken = Problem(dropout)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(regression(6), workdir=tmp_path / "w", progress=interrupt_at(step))
    fresh = Problem(dropout)
    report = fresh.fit(regression(6), workdir=tmp_path / "w", resume=True)
    assert report.resumed_at == step
    assert report.steps == want.steps == 30
    assert len(fresh.seen) == 30 - step
    assert torch.equal(fresh.layer.weight, whole.layer.weight)
    assert torch.equal(fresh.layer.bias, whole.layer.bias)
    assert [entry[0] for entry in report.losses] == [entry[0] for entry in want.losses]
    assert report.losses[-1][1] == want.losses[-1][1]


class Counter:
    """Something that changes with every batch."""

    seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("stop", [7, 9, 11])
def test_resumed_in_the_middle_of_a_step(tmp_path: Path, stop: int) -> None:
    """What random numbers and other state the part of a step has used is taken back."""
    plan = TrainingPlan(epochs=5, steps=None, lr=0.05, accumulate=3, warmup=0.2, precision="bfloat16")

    class Counted(Problem):
        counter, stop = Counter(), -1

        def loss(self, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
            self.counter.seen += 1
            value, shown = super().loss(batch, done)
            if self.counter.seen == self.stop:
                raise KeyboardInterrupt
            return value * (1 + self.counter.seen), shown

        def run(self, **settings: Any) -> FitReport:
            torch.manual_seed(1)
            self.counter = Counter()
            return fit(
                list(self.layer.parameters()), self.loss, Data.of(regression(6)), plan, RunSettings(**settings),
                "the-fit",
                stateful=[self.counter],
            )  # fmt: skip

    whole, broken, resumed = Counted(0.5), Counted(0.5), Counted(0.5)
    want = whole.run()
    broken.stop = stop
    with pytest.raises(KeyboardInterrupt):
        broken.run(workdir=tmp_path)
    report = resumed.run(workdir=tmp_path, resume=True)
    assert report.resumed_at == (stop - 1) // 3
    assert (report.steps, report.losses) == (10, want.losses)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert resumed.counter.seen == 30


def test_checkpoint_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Problem().fit(regression(), workdir=tmp_path, progress=interrupt_at(2))
    assert [path.name for path in tmp_path.iterdir()] == ["the-fit"]
    assert json.loads((tmp_path / "the-fit" / "fit.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0")]
)
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It ends the fit with what was kept, from which it can be resumed."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
    original, count = accelerate.Accelerator.save_state, itertools.count(1)

    def save_state(self: accelerate.Accelerator, directory: str, **options: Any) -> Any:
        if next(count) == 3:
            (Path(directory) / "half").write_text("of it")
            raise error
        return original(self, directory, **options)

    monkeypatch.setattr(accelerate.Accelerator, "save_state", save_state)
    with pytest.raises(SaveError, match=r"checkpoint of step 3 cannot .*\. The checkpoint of step 2 was kept\. Make"):
        Problem().fit(regression(), workdir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["the-fit"]
    assert Problem().fit(regression(), workdir=tmp_path, resume=True).resumed_at == 2


@pytest.mark.parametrize("file", ["fit.json", "optimizer.bin"])
def test_damaged_checkpoint(tmp_path: Path, file: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Problem().fit(regression(), workdir=tmp_path, progress=interrupt_at(2))
    (tmp_path / "the-fit" / file).write_text("[")
    with pytest.raises(LoadError, match=r"The checkpoint in .*the-fit is damaged: .*\. Start again without resume="):
        Problem().fit(regression(), workdir=tmp_path, resume=True)


def test_resuming_a_finished_fit_changes_nothing(tmp_path: Path) -> None:
    problem = Problem()
    problem.fit(regression(), workdir=tmp_path)
    again = Problem()
    report = again.fit(regression(), workdir=tmp_path, resume=True)
    assert not again.seen
    assert report.resumed_at == report.steps == 30
    assert torch.equal(again.layer.weight, problem.layer.weight)


@pytest.mark.parametrize(("name", "resumed_at"), [("label", 9), ("key", 0)])
def test_another_label_is_the_same_fit_and_another_key_is_not(tmp_path: Path, name: str, resumed_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        Problem().fit(regression(), workdir=tmp_path, progress=interrupt_at(9))
    again = Problem()
    setattr(again, name, "another")
    assert again.fit(regression(), workdir=tmp_path, resume=True).resumed_at == resumed_at
    assert {moment.what for moment in again.progress} == {again.label}


def test_resuming_from_nothing_starts_anew(tmp_path: Path) -> None:
    assert Problem().fit(regression(), workdir=tmp_path / "none", resume=True).resumed_at == 0


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Problem().fit(regression())
    assert not list(tmp_path.iterdir())


def test_without_resume_an_old_checkpoint_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Problem().fit(regression(), workdir=tmp_path, progress=interrupt_at(9))
    problem = Problem()
    assert problem.fit(regression(), workdir=tmp_path).resumed_at == 0
    assert len(problem.seen) == 30


# --- which loss -------------------------------------------------------------------------------------------------------


def test_loss_of_the_data_comes_first(traces: Any) -> None:
    def own(outputs: Any, batch: Batch) -> Tensor:
        return torch.zeros(())

    assert loss_of(traces("gelu"), Data.of(labelled(), loss=own)) is own


def test_loss_of_the_models_head_and_of_labels(traces: Any) -> None:
    data = labelled()
    (inputs, labels), logits = data[0], torch.randn(8, 3)
    want = torch.nn.functional.cross_entropy(logits, labels)
    for name in ("bert", "gelu"):
        graph = traces(name)
        assert graph.meta["trace"].task == ("sequence-classification" if name == "bert" else None)
        loss = loss_of(graph, Data.of(data))
        assert loss(logits, Batch(kwargs=inputs, labels=labels)) == pytest.approx(float(want))


def test_no_loss_is_known(traces: Any) -> None:
    data = [(inputs, labels.float()) for inputs, labels in labelled()]
    with pytest.raises(UsageError, match="loss="):
        loss_of(traces("gelu"), Data.of(data))
    assert isinstance(traces("gelu").meta["trace"], TraceInfo)


def test_a_model_is_not_shared_out_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.FSDP)
    problem = Problem()
    before = [parameter.clone() for parameter in problem.layer.parameters()]
    with pytest.raises(UsageError, match=r"FSDP.*without --use_fsdp"):
        problem.fit(regression())
    assert all(map(torch.equal, problem.layer.parameters(), before))
