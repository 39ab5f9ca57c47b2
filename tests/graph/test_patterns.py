"""Patterns: which paths they fit, and that the first that fits counts."""

from __future__ import annotations

import pytest

from surgeon.graph.patterns import first_fit, matches
from surgeon.passes.options import for_site


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("layer.0.ffn", "layer.0.ffn", True),
        ("layer.0", "layer.0.ffn", False),
        ("layer.*", "layer.0.ffn", True),
        ("*.ffn", "layer.0.ffn", True),
        ("LAYER.*", "layer.0.ffn", False),
        ("layer.[12].ffn", "layer.1.ffn", True),
        ("layer.[12].ffn", "layer.0.ffn", False),
        ("layer[0]", "layer[0]", True),  # a path fits itself
    ],
)
def test_what_a_pattern_fits(pattern: str, path: str, fits: bool) -> None:
    assert matches([pattern], path) is fits
    assert matches(["nowhere", pattern], "elsewhere", path) is fits
    assert not matches([], path)


def test_the_first_that_fits_counts() -> None:
    values = {"*.0.*": 1, "*": 2, "layer.1.ffn": 3}
    assert first_fit(values, "layer.0.ffn") == 1
    assert first_fit(values, "layer.1.ffn") == 2
    assert first_fit({"a": 1, "b": 2}, "b", "a") == 1, "the order is that of the patterns"
    assert first_fit({"a": 1}, "b") is None


@pytest.mark.parametrize("values", [{"*.0.*": 1, "*": 2}, {"*": 2, "*.0.*": 1}, {"*.1.*": 1}])
def test_options_of_passes_choose_alike(values: dict[str, int]) -> None:
    for path in ("layer.0.ffn", "layer.1.ffn"):
        assert for_site(values, path) == first_fit(values, path)
