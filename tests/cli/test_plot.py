"""`surgeon plot`: a picture of each kind, and what is missing for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .harness import Run

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0")


def words(file: str) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", Path(file).read_text(encoding="utf-8")))


@pytest.mark.parametrize(("kind", "wanted"), [
    ("pareto", "multiply-adds of the whole model"), ("layers", "one layer at a time"),
    ("experts", "share of its experts that a token runs"), ("routers", "true norm"), ("compute", "tau 0.5"),
])  # fmt: skip
def test_what_is_measured_is_drawn(run: Run, kind: str, wanted: str) -> None:
    result = run("plot", "bert-moe", kind, *REVIEWS, "--tau", "0.5", "-o", "a.svg", "-o", "a.png")
    assert result.code == 0, result.err
    assert wanted in words("a.svg")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_data_needs_data(run: Run) -> None:
    result = run("plot", "bert-moe", "experts", "-o", "a.svg")
    assert result.code == 2
    assert "Give it with --data" in result.err
    result = run("plot", "bert-moe", "experts", *REVIEWS)
    assert result.code == 2
    assert "-o picture.png" in result.err
    assert run("plot", "bert-moe", "everything", "-o", "a.svg").code == 2


def test_what_was_never_done_is_not_drawn(run: Run) -> None:
    for kind, wanted in (("sparsity", "sparsify"), ("ablation", "--budget-minutes")):
        result = run("plot", "bert-moe", kind, "-o", "a.svg")
        assert result.code == 2
        assert wanted in result.err
        assert not Path("a.svg").exists()


def test_a_report_with_data_has_the_pictures(run: Run) -> None:
    result = run("report", "bert-moe", *REVIEWS, "-o", "page.html")
    assert result.code == 0, result.err
    html = Path("page.html").read_text(encoding="utf-8")
    for title in ("Quality against cost", "Which layers quality depends on", "What tokens run", "What routers predict"):
        assert f">{title}</h2>" in html, title
    assert html.count("<figure class=") == 4
    assert 'class="shaded"' in html  # where computation goes, in the texts themselves
    assert len(set(re.findall(r'id="(surgery-1-[\w-]+)"', html))) == len(re.findall(r'id="(surgery-1-[\w-]+)"', html))
