"""`progress=True` in Python: a display where there is one, and the same reports as a function gets."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import surgeon
from surgeon.data.batch import Batch
from surgeon.display.choose import shows_progress
from surgeon.display.notebook import Cells
from surgeon.measure.judge import judge
from surgeon.measure.load import measure_load
from surgeon.measure.routing import measure_routing
from surgeon.passes import Lower, Moeify
from surgeon.progress import Progress, ShowProgress
from tests.small_models import classifier, labelled, tokens

LONG = [
    surgeon.trace, surgeon.Pipeline.run, surgeon.sweep, surgeon.compare, surgeon.tune, surgeon.compensate, judge,
    measure_load, measure_routing,
]  # fmt: skip


@shows_progress
def work(steps: int, *, progress: ShowProgress = None) -> int:
    for step in range(steps):
        if callable(progress):
            progress(Progress("work", step + 1, steps, {"loss": 0.5}))
    return steps


@pytest.mark.parametrize("function", LONG, ids=lambda function: function.__qualname__)
def test_what_takes_long_takes_progress(function: Any) -> None:
    assert inspect.signature(function).parameters["progress"].default is None
    assert hasattr(function, "__wrapped__")


def test_true_shows_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert work(3, progress=True) == 3
    assert capsys.readouterr().err == "work  1/3  loss 0.5\nwork  3/3  loss 0.5\n"


def test_false_and_nothing_show_nothing_and_a_function_gets_reports(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Progress] = []
    assert work(2, progress=False) == work(2) == work(2, progress=found.append) == 2
    assert [moment.done for moment in found] == [1, 2]
    assert capsys.readouterr().err == ""


def test_only_the_main_process_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    work(3, progress=True)
    assert capsys.readouterr().err == ""


def test_tracing_passes_and_sweeps_report_until_they_are_done() -> None:
    found: list[Progress] = []
    surgery = surgeon.Pipeline([Moeify(experts=4), Lower()]).run(classifier(), inputs=tokens(), progress=found.append)
    traced = [moment for moment in found if moment.what == "tracing Classifier"]
    assert traced[0].total == 0  # its export
    assert traced[-1].done == traced[-1].total > 5
    assert all(0 < moment.done <= moment.total for moment in traced if moment.total)
    assert {"moeify: finding layers", "lower: verifying"} <= {moment.what for moment in found}
    found.clear()
    taus = [0.0, 0.5]
    points = surgeon.sweep(
        surgery.graph, map(Batch.from_any, labelled(3)), None, taus, inputs=tokens(), progress=found.append
    )
    assert found[-1].done == found[-1].total == 6
    assert repr(points).startswith("<Points: 2 settings, ")


class Shell:
    """IPython's, with a kernel, and what was displayed in it."""

    kernel = True

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Shell:
        assert raw
        assert display_id
        self.shown.append(data)
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(data)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    made = Shell()
    display = SimpleNamespace(display=made.display)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: made, display=display))  # type: ignore[arg-type]
    return made


def test_a_notebook_shows_a_bar_with_the_time_left_and_then_the_time(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("surgeon.display.notebook.time.monotonic", lambda: now)
    shown = Cells()
    for step in range(1, 5):
        shown.progress(Progress("<fit>", step, 4, {"loss": 0.5}))
        now += 10.0
    assert '<progress style="width: 10em; vertical-align: middle" max="4" value="3">' in shell.shown[2]["text/html"]
    assert "3/4, 7 s left, loss 0.5" in shell.shown[2]["text/plain"]
    assert "&lt;fit&gt;" in shell.shown[2]["text/html"]
    shown.progress(Progress("calibration", 1, 2))
    now += 0.1
    shown.progress(Progress("calibration", 2, 2))
    shown.close()
    assert shell.shown[-1]["text/plain"] == "<fit>: 30 s, loss 0.5"  # what took no time is left out
    assert "<progress" not in shell.shown[-1]["text/html"]


def test_true_shows_cells_in_a_notebook(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    work(3, progress=True)
    assert "work" in shell.shown[0]["text/plain"]
    assert capsys.readouterr().err == ""
