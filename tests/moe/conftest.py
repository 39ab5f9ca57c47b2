"""A graph with experts, in every form."""

from __future__ import annotations

from typing import Any

import pytest

from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify, Quantize


@pytest.fixture(params=["module", "dynamic", "int8", "int4"])
def graph(request: pytest.FixtureRequest, traces: Any) -> Any:
    made = traces("stack:gelu")
    Moeify(experts=4, router_width=8).apply(made)
    if request.param != "module":
        (Lower() if request.param == "dynamic" else Quantize(weights=request.param)).apply(made)
    assert {site.shown_form for site in find_moes(made)} == {request.param}
    return made
