"""The catalogue, which describes the passes without importing them."""

from __future__ import annotations

import json

import pytest

from surgeon.passes import catalogue, registry
from surgeon.passes.about import describe
from surgeon.passes.catalogue import FILE, all_about, written
from surgeon.passes.registry import all_passes


def test_holds_what_the_passes_say(request: pytest.FixtureRequest) -> None:
    text = written(all_passes())
    if request.config.getoption("--update-golden"):
        FILE.write_text(text, encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") == text, "run pytest --update-golden"
    assert dict(all_about()) == {name: describe(kind) for name, kind in all_passes().items()}
    assert list(all_about()) == list(all_passes())


def test_the_passes_are_asked_if_there_is_a_file_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = json.loads(FILE.read_text(encoding="utf-8"))["modules"]
    monkeypatch.setattr(catalogue, "_modules", lambda: [*modules, "new"])
    monkeypatch.setattr(registry, "all_passes", lambda: {"lower": all_passes()["lower"]})
    assert list(all_about()) == ["lower"]
