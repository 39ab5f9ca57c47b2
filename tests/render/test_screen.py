"""Where answers go: plain and rich text, JSON, and what goes to stderr."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from pathlib import Path

import pytest
from rich.text import Text

from surgeon.json_values import schema_name, to_json
from surgeon.measure.cost import Cost
from surgeon.progress import Progress
from surgeon.render.screen import Screen
from surgeon.text.layout import next_command

ANSI = re.compile(r"\x1b\[")
ANSI_ALL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_plain_output_has_no_escapes_and_rich_output_has(capsys: pytest.CaptureFixture[str]) -> None:
    content = Text("bold", style="bold red")
    Screen("plain").show(content)
    assert capsys.readouterr().out == "bold\n"
    Screen().show(content)  # stdout is no terminal here
    assert capsys.readouterr().out == "bold\n"


def test_rich_output_is_styled_even_into_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Screen("rich").show(Text("bold", style="bold red"))
    assert ANSI.search(capsys.readouterr().out)


def test_json_stands_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen("json")
    screen.show(Text("for people"))
    with screen.stage("working"):
        screen.progress(Progress("fit", 1, 10, {"loss": 0.5}))
    screen.warn("careful")
    screen.result({"cost": Cost(1, 2, 3), "path": Path("a/b"), "bad": math.nan, "pair": (1, "x")})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "cost": {"parameters": 1, "multiply_adds": 2, "executed_multiply_adds": 3, "executed": None, "uncounted": []},
        "path": "a/b",
        "bad": None,
        "pair": [1, "x"],
    }
    assert captured.err.splitlines() == ["working ...", "fit  1/10  loss 0.5", "warning: careful"]


def test_json_refuses_what_it_cannot_say() -> None:
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        to_json({"x": object()})


def test_errors_are_text_on_stderr_and_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("plain").error("no such file [x]", kind="LoadError", exit_code=3)
    assert capsys.readouterr() == ("", "error: no such file [x]\n")
    Screen("json").error("no such file", kind="LoadError", exit_code=3)
    captured = capsys.readouterr()
    assert captured.err == "error: no such file\n"
    error = {"type": "LoadError", "message": "no such file", "exit_code": 3}
    assert json.loads(captured.out) == {"schema": schema_name("error"), "error": error}


def test_progress_prints_a_few_lines_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen("plain")
    for step in range(1, 101):
        screen.progress(Progress("sparsify", step, 100, {"task loss": 1.0 / step, "tokens": 2048 * step}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sparsify  1/100  task loss 1  tokens 2,048"
    assert lines[-1] == "sparsify  100/100  task loss 0.01  tokens 204,800"
    assert len(lines) <= 7


def test_progress_goes_on_printing_when_work_is_slow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("surgeon.display.lines.time.monotonic", lambda: now)
    screen = Screen("plain")
    for step in range(1, 10):
        now += 4.0
        screen.progress(Progress("fit", step, 1000, {}))
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/1000", "4/1000", "7/1000"]


def test_quiet_shows_no_progress_but_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen("plain", quiet=True)
    with screen.stage("working"):
        screen.progress(Progress("fit", 10, 10, {}))
    screen.say("by the way")
    screen.warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


@pytest.mark.parametrize(("verbose", "shown"), [(0, ["W"]), (1, ["W", "I"]), (2, ["W", "I", "D"])])
def test_the_log_is_shown_as_asked_for(capsys: pytest.CaptureFixture[str], verbose: int, shown: list[str]) -> None:
    log = logging.getLogger("surgeon")
    before = log.level, list(log.handlers)
    with Screen("plain", verbose=verbose).logging():
        log.warning("W %d", 1)
        log.info("I")
        log.debug("D")
    err = capsys.readouterr().err
    assert [letter for letter in "WID" if re.search(rf"{letter}( 1)?$", err, re.MULTILINE)] == shown
    assert "warning: W 1" in err
    assert (log.level, list(log.handlers)) == before


def test_bars_on_a_terminal_leave_the_answer_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen("rich")
    with screen.stage("working"):
        screen.progress(Progress("fit", 1, 2, {"loss": 0.5, "other": 1.0}))
        screen.show(Text("an answer"))
        screen.progress(Progress("fit", 2, 2, {"loss": 0.25}))
    screen.error("oh", kind="X", exit_code=4)
    captured = capsys.readouterr()
    assert captured.out == "an answer\n"
    assert "working" in captured.err
    assert "fit  2/2  loss 0.25" in ANSI_ALL.sub("", captured.err)
    assert captured.err.count("\x1b[?25l") == captured.err.count("\x1b[?25h")  # the cursor is there again


def test_json_on_a_terminal_has_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen("json")
    with screen.stage("working"):
        screen.result({"a": 1})
    screen.error("oh", kind="X", exit_code=4)
    captured = capsys.readouterr()
    first, second = captured.out.split("}\n{")
    assert json.loads(first + "}") == {"a": 1}
    assert json.loads("{" + second)["error"]["message"] == "oh"
    assert ANSI_ALL.sub("", captured.err) == "working ...\nerror: oh\n"


class Terminal(io.StringIO):
    """Stands in for a terminal of 40 columns."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Screen, Terminal]:
    made = Terminal()
    monkeypatch.setattr("sys.stdout", made)
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Screen(), made


def test_errors_break_between_words_and_commands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, terminal = on_terminal(monkeypatch)
    words, command = "one budget that cannot be met " * 5, f"  surgeon apply {'model ' * 12}".rstrip()
    screen.error(f"{words}\n{command}", kind="UsageError", exit_code=2)
    lines = ANSI_ALL.sub("", terminal.getvalue()).splitlines()
    assert command in [line.rstrip() for line in lines]
    assert all(len(line) <= 40 for line in lines[:-1])
    assert set(" ".join(lines[:-1]).split()) == {"error:", *words.split()}


def test_a_command_to_copy_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, terminal = on_terminal(monkeypatch)
    screen.show(next_command("to see it", "sweep", "a-surgery", "--data", "path/to/the/reviews/of/all/films.csv"))
    lines = ANSI_ALL.sub("", terminal.getvalue()).splitlines()
    assert lines == ["Next, to see it:", "  surgeon sweep a-surgery --data path/to/the/reviews/of/all/films.csv"]
