"""A pass and the graph it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from surgeon.graph.traced import TracedGraph
from surgeon.passes import Pass

from .subjects import SUBJECTS


@pytest.fixture
def subject(traces: Any) -> Callable[[str], tuple[Pass[Any], TracedGraph]]:
    """`subject(name)`: the pass and a graph of its own to run on, in evaluation mode."""

    def make(name: str) -> tuple[Pass[Any], TracedGraph]:
        graph = traces(f"stack:{SUBJECTS[name].kind}")
        for one in SUBJECTS[name].first:
            one.apply(graph)
        return SUBJECTS[name].make(), graph.eval()

    return make
