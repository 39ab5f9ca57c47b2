"""The two forms in which experts are saved, and what lies in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgeon.passes import Lower, Moeify

FORMS = {"masked": [Moeify(experts=4, router_width=8)], "dynamic": [Moeify(experts=4, router_width=8), Lower()]}
forms = pytest.mark.parametrize("form", FORMS)


def listing(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))
