"""How results look in a notebook: short texts, and HTML that IPython finds by the name of the type."""

from __future__ import annotations

from typing import Any

import pytest

import surgeon
from surgeon.measure.tuning import Tuned
from surgeon.passes import Lower, Moeify
from surgeon.render.notebook import COLOURS, VIEWS, register
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import tokens


class Formatter:
    """IPython's, as far as it is used: a type is found by its module and name."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Any] = {}
        self.formatters = {"text/html": self}
        self.display_formatter = self

    def for_type_by_name(self, module: str, name: str, show: Any) -> None:
        self.known[module, name] = show

    def __call__(self, value: Any) -> str:
        kinds = [(kind.__module__, kind.__name__) for kind in type(value).__mro__]  # graphs have classes of their own
        return str(next(self.known[kind] for kind in kinds if kind in self.known)(value))


@pytest.fixture
def shown() -> Formatter:
    made = Formatter()
    register(made)
    return made


def test_every_type_exists() -> None:
    for module, name in VIEWS:
        found = getattr(__import__(module, fromlist=[name]), name)
        assert found.__module__ == module


def test_results_are_html(traces: Any, shown: Formatter) -> None:
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(traces("gelu"), inputs=tokens())
    html = shown(surgery)
    assert "moeify" in html
    assert "<iframe srcdoc=" in html
    assert "<script" not in html  # of the page in the frame it is escaped
    assert "blocks.0" in shown(surgery.diff())
    assert "2 of" in shown(surgery.reports[0])
    assert "dynamic_k_ffn" in shown(surgery.graph)
    tuned = Tuned({"a.moe": 0.1}, {"a.moe": 0.25}, 0.5, 0.0, 0.1, 0.5, 0.0, 1)
    assert "a.moe" in shown(tuned)
    assert "25%" in shown(tuned)
    assert repr(tuned) == "<Tuned: 1 layer, cost 50.0%, damage 0 nats>"


def test_texts_are_short(traces: Any) -> None:
    graph = traces("gelu")
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(graph, inputs=tokens())
    (first, *_), _ = surgeon.find_ffns(graph)
    values = [surgery, surgery.graph, surgery.diff(), surgery.reports[0], first, surgeon.find_moes(surgery.graph)[0]]
    for value in values:
        assert len(repr(value)) < 200, value
    assert "moeify, lower" in repr(surgery)
    assert repr(first) == f"<FFN {first.path}: {first.describe}>"


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("page", [(255, 255, 255), (19, 20, 22)])
def test_colours_are_told_from_light_and_from_dark_pages(
    colour: tuple[int, int, int], page: tuple[int, int, int]
) -> None:
    def light(parts: tuple[int, int, int]) -> float:
        """Relative luminance, as WCAG 2 defines it."""
        shares = [part / 255 for part in parts]
        linear = [share / 12.92 if share <= 0.04 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(colour), light(page)), reverse=True)
    assert (high + 0.05) / (low + 0.05) > 3.5


def test_what_is_shown_has_these_colours(shown: Formatter, traces: Any) -> None:
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(traces("gelu"), inputs=tokens())
    assert "#cd463c" in shown(surgery.diff())  # what was
