"""Bars on a terminal: they move whatever the main thread does, and say how much time is left."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest

from surgeon.display import durations
from surgeon.display.choose import console_on_stderr, display_on
from surgeon.display.lines import Lines
from surgeon.display.terminal import Bars
from surgeon.progress import Progress
from surgeon.tracing.quiet import quiet

SPINNER = re.compile("[\u2800-\u28ff]")


class Terminal(io.StringIO):
    """Stands in for a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[str]:
        """What was drawn, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()).split("\r")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


@pytest.fixture
def bars(terminal: Terminal) -> Bars:
    made = display_on(console_on_stderr(), moving=True, command="inspect bert")
    assert isinstance(made, Bars)
    return made


def test_bars_move_while_an_export_is_silenced(terminal: Terminal, bars: Bars) -> None:
    with bars.stage("tracing Net"), quiet():
        before = len(terminal.getvalue())
        sys.stderr.write("a partial graph")
        time.sleep(0.6)
        drawn = terminal.getvalue()[before:]
    bars.close()
    assert len(set(SPINNER.findall(drawn))) >= 3
    assert re.search(r"0\.[3-6] s", drawn)
    assert "a partial graph" not in terminal.getvalue()


def test_the_first_frame_is_there_at_once(terminal: Terminal, bars: Bars) -> None:
    bars.waiting("loading PyTorch")
    assert "loading PyTorch" in terminal.getvalue()
    bars.progress(Progress("sweep", 1, 2))
    assert "loading PyTorch" not in terminal.frames[-1]
    bars.close()


def test_the_time_left_of_steps_that_are_counted_is_that_of_their_speed(terminal: Terminal, bars: Bars) -> None:
    for step in range(5):
        bars.progress(Progress("fit", step, 100, {"loss": 0.5}))
        time.sleep(0.15)
    bars.close()
    assert re.search(r"4/100 1[0-9] s left .*loss 0\.5", "\n".join(terminal.frames))


def test_the_time_left_of_other_steps_is_that_of_the_last_time(terminal: Terminal, bars: Bars) -> None:
    durations.remember("loading bert", 20.0, "inspect bert")
    durations.remember("loading PyTorch", 4.0)
    bars.waiting("loading PyTorch")
    with bars.stage("loading bert"):
        time.sleep(0.3)
    bars.close()
    assert "4 s left" in "\n".join(terminal.frames)
    assert "20 s left" in "\n".join(terminal.frames)
    before = len(terminal.getvalue())
    other = display_on(bars._console, moving=True, command="inspect gpt2")
    with other.stage("loading bert"):
        time.sleep(0.3)
    other.close()
    assert "left" not in terminal.getvalue()[before:]


def test_what_was_told_last_is_one_row(terminal: Terminal, bars: Bars) -> None:
    with bars.stage("tuning"):
        bars.progress(Progress("calibration", 3, 10))  # never told to be over
        bars.progress(Progress("fit", 1, 10))
    terminal.truncate(0)
    time.sleep(0.25)
    assert "fit" in terminal.getvalue()
    assert "calibration" not in terminal.getvalue()
    with bars.hidden():
        pass
    terminal.truncate(0)
    time.sleep(0.25)
    bars.close()
    assert "fit" not in terminal.getvalue()


def test_something_moves_until_the_next_work_is_told_of(terminal: Terminal, bars: Bars) -> None:
    for step in (1, 2):
        bars.progress(Progress("fit", step, 2))
    terminal.truncate(0)
    time.sleep(0.35)
    assert len(set(SPINNER.findall(terminal.getvalue()))) >= 2
    assert re.search(r"fit .*2/2(?! +0 s)", terminal.frames[-1])
    bars.progress(Progress("fit", 1, 9))  # the same work once more
    time.sleep(0.25)
    assert re.search(r"fit .*1/9", terminal.frames[-1])
    bars.progress(Progress("fit", 9, 9))
    bars.progress(Progress("fit", 0, 0))
    time.sleep(0.25)
    assert re.search(r"fit .*0\.\d s", terminal.frames[-1])
    bars.progress(Progress("verifying", 0, 0))
    assert "fit" not in terminal.frames[-1]
    bars.close()


def test_steps_of_a_stage_are_counted_in_its_own_row(terminal: Terminal, bars: Bars) -> None:
    with bars.stage("tracing Net") as tell:
        assert tell is not None
        tell(Progress("tracing Net", 0, 0))
        tell(Progress("tracing Net", 7, 20))
        time.sleep(0.25)
    bars.close()
    assert re.search(r"tracing Net .*7/20", "\n".join(terminal.frames))


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_where_nothing_may_move_there_are_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)  # pytest sets its own after fixtures
    monkeypatch.setenv(name, value)
    shown = display_on(console_on_stderr(), moving=True)
    assert type(shown) is Lines
    with shown.stage("loading bert"):
        shown.progress(Progress("fit", 10, 10, {"loss": 0.5}))
    assert terminal.frames == ["loading bert ...\nfit  10/10  loss 0.5\n"]


def test_times_are_kept_if_they_are_long_and_replaced_if_they_change(terminal: Terminal) -> None:
    durations.remember("short", 0.2)
    durations.remember("long", 5.0)
    durations.remember("long", 0.5)
    assert durations.expected("short") is None
    assert durations.expected("long") == 0.5
    for number in range(400):
        durations.remember(f"step {number}", 2.0)
    assert durations.expected("long") is None
    assert durations.expected("step 399") == 2.0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', '{"a": null}'])
def test_damaged_times_are_none(terminal: Terminal, content: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "durations.json").write_text(content)
    assert durations.expected("a") is None
    durations.remember("a", 3.0)
    assert durations.expected("a") == 3.0


def test_nothing_is_kept_of_what_failed(terminal: Terminal, bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(durations, "remember", lambda what, took, command: kept.append(what))
    with pytest.raises(KeyError), bars.stage("failed"):
        raise KeyError
    with bars.stage("done"):
        pass
    bars.close()
    assert kept == ["done"]
