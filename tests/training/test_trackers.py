"""The losses of every step reach the tracker that was asked for, and unknown trackers are refused before the work."""

from __future__ import annotations

from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate.utils import LoggerType
from torch import Tensor, nn

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.training.loop import RunSettings, TrainingPlan, fit
from surgeon.training.trackers import check_tracker


class Recorder(accelerate.tracking.GeneralTracker):
    """A tracker that keeps what it gets."""

    name, requires_logging_directory = "tensorboard", True
    events: ClassVar[list[Any]] = []

    def __init__(self, run_name: str, logging_dir: Any) -> None:
        super().__init__()
        self.events.append(("start", run_name, str(logging_dir)))

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(("plan", values["fit"], values["lr"], None in values.values()))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("end")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is reported to the tracker called tensorboard."""
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "events", [])
    return Recorder.events


def train(layer: nn.Linear, **settings: Any) -> None:
    def loss(batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
        value = layer(batch.args[0]).square().mean()
        return value, {"loss": value.item()}

    plan = TrainingPlan(epochs=1, steps=3, lr=0.5)
    data = Data([torch.ones(2, 4)])
    fit(list(layer.parameters()), loss, data, plan, RunSettings(**settings), "the-fit")


def test_every_step_is_reported(recorder: list[Any]) -> None:
    train(nn.Linear(4, 1), report_to="tensorboard")
    start, plan, *steps, end = recorder
    assert start == ("start", "surgeon", "runs")
    assert plan == ("plan", "the-fit", 0.5, False)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert all(list(values) == ["the-fit/loss"] for _, values in steps)
    assert steps[0][1] != steps[-1][1]
    assert end == "end"


def test_nothing_is_reported_unasked(recorder: list[Any]) -> None:
    train(nn.Linear(4, 1))
    assert recorder == []


def test_a_run_that_fails_is_ended(recorder: list[Any]) -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    with pytest.raises(Exception, match="the loss is nan"):
        train(layer, report_to="tensorboard")
    assert recorder[-1] == "end"


def test_unknown_and_missing_trackers_are_refused(recorder: list[Any]) -> None:
    check_tracker("tensorboard")
    with pytest.raises(UsageError, match=r"No tracker 'tensorbord'\. accelerate knows .*tensorboard"):
        check_tracker("tensorbord")
    with pytest.raises(UsageError, match=r"The tracker wandb is not installed.*pip install wandb"):
        check_tracker("wandb")
