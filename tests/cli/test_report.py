"""`surgeon report`: one HTML file of saved surgeries, which needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from surgeon.surgery.artifact import load_diff

from .harness import DATA, NET, Run


class Page(HTMLParser):
    """The words of a page, the addresses it names, and the JSON of its drawings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.drawings: list[dict] = []  # type: ignore[type-arg]
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self._inside = "json" if values.get("type") == "application/json" else tag
        self.addresses += [str(values[name]) for name in ("src", "href", "data", "action") if name in values]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.drawings.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(run: Run, *args: str) -> Page:
    result = run("report", *args, "-o", "page.html")
    assert result.code == 0, result.err
    assert "Written to page.html" in result.err + result.out
    return Page(Path("page.html").read_text(encoding="utf-8"))


def test_a_report_says_what_was_done_and_why_the_rest_was_left(run: Run) -> None:
    found = page(run, "bert-moe")
    for words in ("What was done", "moeify", "What to do".lower(), "pooler or a classifier head", "experts of"):
        assert words in found.text, words


def test_a_report_asks_for_nothing_from_outside(run: Run) -> None:
    found = page(run, "bert-moe")
    assert found.addresses
    assert all(address.startswith("#") for address in found.addresses)
    html = Path("page.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|importScripts", html)


def test_every_stage_of_the_graph_is_drawn(run: Run) -> None:
    (drawn,) = page(run, "bert-moe").drawings
    diff = load_diff("bert-moe")
    assert drawn["stages"] == ["before", *(pass_.report.name for pass_ in diff.passes)]
    for number, nodes in enumerate(diff.graphs()):
        there = {node[0] for node in drawn["nodes"] if node[6] <= number <= node[7]}
        assert there == {node.name for node in nodes}
    for number, pass_ in enumerate(diff.passes, 1):
        added = {node[0] for node in drawn["nodes"] if node[6] == number and node[8]}
        removed = {node[0] for node in drawn["nodes"] if node[7] == number - 1 and node[9]}
        assert added == {node.name for node in pass_.graph.added}
        assert removed == {node.name for node in pass_.graph.removed}


def test_several_surgeries_stand_side_by_side(run: Run) -> None:
    found = page(run, "first=bert-moe", "second=bert-moe")
    assert len(found.drawings) == 2
    assert "Side by side" in found.text
    assert found.text.count("multiply-adds if everything runs") == 3


def test_two_surgeries_of_one_name_are_refused(run: Run) -> None:
    result = run("report", "bert-moe", "bert-moe")
    assert result.code == 2
    assert "first=bert-moe" in result.err


def test_words_from_the_model_are_no_markup(run: Run, tmp_path: Path) -> None:
    """Paths of modules and descriptions of data come from others."""
    record = json.loads(Path("bert-moe/surgery.json").read_text())
    diff = json.loads(Path("bert-moe/diff.json").read_text())
    evil = "</script><img src=x onerror=alert(1)>"
    record["recipe"]["data"] = evil
    diff["nodes"][0]["path"] = evil
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "surgery.json").write_text(json.dumps(record))
    (copy / "diff.json").write_text(json.dumps(diff))
    found = page(run, f"copy={copy}")
    assert evil in found.text
    assert any(node[1] == evil for node in found.drawings[0]["nodes"])
    assert "<img" not in Path("page.html").read_text(encoding="utf-8")


def test_what_is_no_saved_surgery_is_refused(run: Run) -> None:
    result = run("report", "bert-dir")
    assert result.code == 3
    assert "not a saved surgery" in result.err
    assert run("report", "bert-moe", "-o", "page.pdf").code == 2
    assert not Path("page.pdf").exists()


def test_apply_writes_the_report_of_what_it_saved(run: Run) -> None:
    passes = ("--passes", "moeify,lower", "--set", "moeify.experts=4", "--set", "moeify.steps=2")
    result = run("apply", *passes, *NET, *DATA, "-o", "own", "--report", "own.html", "--output", "json")
    assert result.code == 0, result.err
    assert result.json["report"] == "own.html"
    assert run("report", "own", *DATA, "-o", "after.html").code == 0
    one, other = (Page(Path(name).read_text(encoding="utf-8")) for name in ("own.html", "after.html"))
    assert "Quality against cost" in one.text
    assert one.text == other.text
    assert one.drawings == other.drawings


def test_apply_without_data_or_layers_that_skip_reports_what_there_is(run: Run) -> None:
    for name, passes, data in (("bare", "moeify", ()), ("relu", "swap-activation", DATA)):
        result = run("apply", "--passes", passes, *NET, *data, "-o", name, "--report", f"{name}.html")
        assert result.code == 0, result.err
        assert f"The report is in {name}.html." in result.out
        found = Page(Path(f"{name}.html").read_text(encoding="utf-8"))
        assert passes in found.text
        assert "Quality against cost" not in found.text


def test_a_report_that_cannot_be_written_stops_apply_before_it_works(run: Run) -> None:
    for given, words in ((("--report", "own.pdf"), "html"), (("--report", "own.html", "--dry-run"), "--dry-run saves")):
        result = run("apply", "--passes", "moeify", *NET, "-o", "own", *given)
        assert result.code == 2
        assert words in result.err
        assert not Path("own").exists()
