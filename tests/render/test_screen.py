"""How answers look: numbers, joined sites, the diff at several widths, JSON, and what goes to stderr."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import pytest
from rich.text import Text

from surgeon.graph.snapshot import GraphDiff
from surgeon.measure.meter import Cost
from surgeon.passes import Moeify
from surgeon.passes.report import PassDiff, PassReport, SiteChange
from surgeon.progress import Progress
from surgeon.render.screen import Screen, to_json
from surgeon.sites.rejection import Rejection
from surgeon.surgery.diff import Diff
from surgeon.text.diff import diff_view
from surgeon.text.plain import diff_text, plain_text
from surgeon.text.reasons import count_reasons
from surgeon.text.summary import (
    change,
    growth,
    join_paths,
    join_sites,
    natural,
    number,
    percent,
    seconds,
)
from surgeon.training.loop import FitReport

ANSI = re.compile(r"\x1b\[")


def site(path: str, executed: float | None = 1.0) -> SiteChange:
    return SiteChange(
        path,
        "FFN 384→1536→384 gelu",
        "48 experts × 32, router 128",
        (1181568, 1236864),
        (1179648, 1234944),
        ("a", "b"),
        f"{path}.moe",
        executed,
    )


def report(**changes: object) -> PassReport:
    paths = [f"encoder.layer.{index}" for index in range(6)]
    values: dict[str, object] = {
        "name": "moeify",
        "options": {"experts": 48},
        "matched": paths,
        "rejected": (
            Rejection(
                "pooler", "tanh between linears 384→384→2 is a pooler or a classifier head, not an FFN", "pooler"
            ),
        ),
        "sites": tuple(site(path) for path in paths),
        "seconds": 23.4,
        "before": Cost(22_600_000, 176_000_000, 176_000_000),
        "after": Cost(23_000_000, 184_000_000, 184_000_000, 1.0),
        "max_error": 2.1e-07,
        "notes": (Moeify.untrained,),
    }
    return PassReport(**{**values, **changes})  # type: ignore[arg-type]


def diff(*reports: PassReport) -> Diff:
    nodes = GraphDiff(
        {
            "encoder.layer.10": [("-", "gelu_10 = gelu(linear_65) : 2×8×1536")],
            "encoder.layer.2": [("-", "gelu_2 = gelu(linear_17) : 2×8×1536"), ("+", "moe_2 = moe(add) : 2×8×384")],
        },
        [("-", "encoder.layer.2.fc.weight [1536, 384]")],
    )
    return Diff(tuple(PassDiff(one, nodes) for one in reports))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (384, "384"), (999, "999"), (1000, "1.00 k"), (33088, "33.1 k"), (999_999, "1.00 M"),
        (1_181_568, "1.18 M"), (12_400_000_000, "12.4 G"), (124_000_000, "124 M"), (3e12, "3.00 T"), (0.5, "0.500"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_changes_and_times_are_short() -> None:
    assert [percent(x) for x in (None, 0.0, 0.0123, 0.423, 1.0)] == ["", "0%", "1.2%", "42%", "100%"]
    assert change(33088, 33088) == "33.1 k"
    assert change(33088, 42304) == "33.1 k → 42.3 k"
    assert (growth(100, 104.7), growth(100, 60), growth(5, 5), growth(0, 5)) == ("+4.7%", "-40%", "", "")
    assert [seconds(x) for x in (0.34, 42.4, 59.7, 200, 7320)] == [
        "0.3 s",
        "42 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 2 min",
    ]
    assert seconds(4) == "4 s"


# --- joining ----------------------------------------------------------------------------------------------------------


def test_paths_of_repeated_layers_are_joined() -> None:
    assert join_paths(["h.0.mlp", "h.1.mlp", "h.2.mlp"]) == "h.0…2.mlp"
    assert join_paths(["h.0", "h.1", "h.3", "h.7", "h.8"]) == "h.0…1,3,7…8"
    assert join_paths(["stages.1.blocks.0.fc", "stages.1.blocks.1.fc"]) == "stages.1.blocks.0…1.fc"
    assert join_paths(["head"]) == "head"


def test_sites_are_joined_only_where_they_look_the_same() -> None:
    paths = ["a.0.x", "a.1.x", "a.0.y", "b.0.x"]
    assert [(group.label, group.count) for group in join_sites([site(path) for path in paths])] == [
        ("a.0…1.x", 2), ("a.0.y", 1), ("b.0.x", 1)
    ]  # fmt: skip
    apart = join_sites([site("a.0", 0.5), site("a.1", 0.25)])
    assert [group.label for group in apart] == ["a.0", "a.1"]


def test_reasons_are_counted_without_their_particulars() -> None:
    rejected = [
        Rejection("different-inputs", "gate and up read different inputs", "a"),
        Rejection("escapes", "the hidden values (gelu_1) are also used outside the FFN, by 'aux.1'", "b"),
        Rejection("escapes", "the hidden values (gelu_2) are also used outside the FFN, by 'aux.2'", "c"),
    ]
    common, rare = count_reasons(rejected)
    assert (common.count, common.first) == (2, "b")
    assert common.text == rejected[1].reason
    assert (rare.count, rare.first) == (1, "a")


def test_layers_sort_by_number() -> None:
    assert sorted(["h.10", "h.9", "h.mlp", "h.1"], key=natural) == ["h.1", "h.9", "h.10", "h.mlp"]


# --- the diff ---------------------------------------------------------------------------------------------------------


def test_diff_says_what_a_pass_did_in_one_line_a_group() -> None:
    header, parameters, adds, columns, sites, refused, note = diff_text(diff(report()).passes, "sites").splitlines()[:7]
    assert header == "moeify  6 of 7 sites  same output (differs by 2e-07)  not trained  23 s"
    assert parameters == "  parameters     22.6 M → 23.0 M  +1.8%"
    assert adds == "  multiply-adds  176 M → 184 M    +4.5%  100% of the experts ran"
    assert columns.split() == ["site", "was", "→", "is", "parameters", "mult-adds/token", "ran"]
    assert sites == (
        "  encoder.layer.0…5  ×6  FFN 384→1536→384 gelu → 48 experts × 32, router 128"
        "  1.18 M → 1.24 M  1.18 M → 1.23 M  100%"
    )
    assert note.startswith("  note: The routers were not trained")
    assert refused == "  refused pooler: tanh between linears 384→384→2 is a pooler or a classifier head, not an FFN"


def test_str_of_a_diff_is_its_text() -> None:
    one = diff(report())
    assert str(one) == diff_text(one.passes, "sites")
    assert one.text("stat") == diff_text(one.passes, "stat")


@pytest.mark.parametrize("detail", ["sites", "stat", "full"])
@pytest.mark.parametrize("width", [80, 100, 120])
def test_diff_fits_the_terminal(width: int, detail: str) -> None:
    several = diff(report(name="swap-activation", preserved=False, max_error=0.31), report())
    lines = plain_text(diff_view(several.passes, detail), width).splitlines()  # type: ignore[arg-type]
    assert max(map(len, lines)) <= width
    joined = " ".join(" ".join(lines).split())
    assert "176 M → 184 M" in joined
    assert "moeify" in joined
    assert not any(line != line.rstrip() for line in lines)


def test_narrow_terminals_get_three_lines_a_group() -> None:
    lines = plain_text(diff_view(diff(report()).passes, "sites"), 80).splitlines()
    start = lines.index("  encoder.layer.0…5  ×6")
    assert lines[start + 1] == "    FFN 384→1536→384 gelu → 48 experts × 32, router 128"
    assert lines[start + 2].startswith("    1.18 M → 1.24 M parameters, 1.18 M → 1.23 M multiply-adds/token, 100% ran")


def test_full_diff_has_every_site_and_node_by_module_path() -> None:
    text = diff_text(diff(report()).passes, "full")
    assert all(f"encoder.layer.{index} " in text for index in range(6))
    assert text.index("  encoder.layer.2\n") < text.index("  encoder.layer.10\n")
    assert "    - gelu_2 = gelu(linear_17) : 2×8×1536\n    + moe_2 = moe(add) : 2×8×384" in text
    assert "  parameters\n    - encoder.layer.2.fc.weight [1536, 384]" in text


def test_stat_has_a_line_a_pass() -> None:
    fit = FitReport(120, 3.0, 33.5, ((1, {"router loss": 1.2}), (120, {"router loss": 0.03})))
    lines = diff_text(diff(report(name="lower", sites=()), report(fit=fit)).passes, "stat").splitlines()
    assert [line.split()[0] for line in lines] == ["pass", "lower", "moeify"]
    assert lines[2].split() == [
        "moeify", "6/7", "22.6", "M", "→", "23.0", "M", "176", "M", "→", "184", "M", "100%", "same", "(2e-07)", "120",
        "steps", "23", "s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preserved": False, "max_error": 0.0312}, "output moved by 3.1%"),
        ({"preserved": False, "max_error": 49.2}, "output moved by 49×"),
        ({"max_error": 0.0}, "same output  not trained"),
        ({"max_error": None}, "not verified"),
        ({"matched": [], "sites": ()}, "0 of 1 sites  nothing changed"),
        (
            {"after": Cost(23_000_000, 184_000_000, 62_000_000, 0.27)},
            "27% of the experts ran, 62.0 M in all (example inputs, padding counted)",
        ),
        ({"before": None, "after": None}, "moeify  6 of 7 sites"),
        ({"notes": ("Batch size is fixed.",)}, "note: Batch size is fixed."),
        ({"notes": ()}, "same output (differs by 2e-07)  23 s"),
        ({"fit": FitReport(0, 0.0, 0.0, ())}, "  fitted without training\n"),
        ({"name": "third-party"}, "third-party  6 of 7 sites  same output (differs by 2e-07)  23 s"),
        (
            {"fit": FitReport(120, 3.0, 33.5, ((1, {"router loss": 1.2}), (120, {"router loss": 0.03})), 40)},
            "trained 120 steps in 34 s, resumed at 40: router loss 1.2 → 0.03",
        ),
    ],
)
def test_diff_tells(changes: dict[str, object], words: str) -> None:
    assert words in diff_text(diff(report(**changes)).passes)


def test_refusals_for_the_same_reason_are_one_line() -> None:
    rejected = tuple(
        Rejection("escapes", f"the hidden values (gelu_{index}) escape", f"h.{index}") for index in range(3)
    )
    text = diff_text(diff(report(rejected=rejected)).passes)
    assert "refused 3 sites, first h.0: the hidden values (gelu_0) escape" in text
    assert "h.1" not in text
    assert "refused h.1: the hidden values (gelu_1) escape" in diff_text(diff(report(rejected=rejected)).passes, "full")


# --- where it goes ----------------------------------------------------------------------------------------------------


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
        "cost": {"parameters": 1, "multiply_adds": 2, "executed_multiply_adds": 3, "executed": None},
        "path": "a/b",
        "bad": None,
        "pair": [1, "x"],
    }
    assert captured.err.splitlines() == ["working ...", "fit  1/10  loss 0.5", "warning: careful"]


def test_json_refuses_what_it_cannot_say() -> None:
    with pytest.raises(TypeError, match="object has no place in JSON"):
        to_json({"x": object()})


def test_errors_are_text_on_stderr_and_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("plain").error("no such file [x]", kind="LoadError", exit_code=3)
    assert capsys.readouterr() == ("", "error: no such file [x]\n")
    Screen("json").error("no such file", kind="LoadError", exit_code=3)
    captured = capsys.readouterr()
    assert captured.err == "error: no such file\n"
    assert json.loads(captured.out) == {"error": {"type": "LoadError", "message": "no such file", "exit_code": 3}}


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
    monkeypatch.setattr("surgeon.render.screen.time.monotonic", lambda: now)
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
    screen = Screen("json")
    with screen.stage("working"):
        screen.progress(Progress("fit", 1, 2, {"loss": 0.5, "other": 1.0}))
        screen.result({"a": 1})
        screen.progress(Progress("fit", 2, 2, {"loss": 0.25}))
    screen.error("oh", kind="X", exit_code=4)
    captured = capsys.readouterr()
    first, second = captured.out.split("}\n{")
    assert json.loads(first + "}") == {"a": 1}
    assert json.loads("{" + second)["error"]["message"] == "oh"
    assert "working" in captured.err
    assert "fit  2/2  loss 0.25" in captured.err
