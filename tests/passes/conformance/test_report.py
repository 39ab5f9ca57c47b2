"""What every pass tells: its report, its options, and the explanation that goes before."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from surgeon.graph.traced import fork
from surgeon.passes import PASSES
from surgeon.passes.report import PassReport
from surgeon.surgery.recipe import build
from surgeon.training.loop import RunSettings
from tests.small_models import labelled_vectors, vectors

from .subjects import SUBJECTS, fits, names, node_texts


def test_every_pass_of_the_table_is_here() -> None:
    assert set(SUBJECTS) == set(PASSES)
    assert all(name == cls.name for name, cls in PASSES.items())


@names
def test_report_is_filled(subject: Any, name: str) -> None:
    one, graph = subject(name)
    report = one.apply(graph, inputs=vectors())
    assert report.name == name
    assert len(report.sites) == len(report.matched)
    assert [site.path for site in report.sites] == report.matched
    assert report.before is not None
    assert report.after is not None
    assert report.before.parameters > 0
    assert report.after.multiply_adds > 0
    assert report.seconds >= 0
    assert report.fit is None
    made = {node.name for node in graph.graph.nodes}
    for site in report.sites:
        assert site.before
        assert site.after
        assert min(*site.parameters, *site.multiply_adds) > 0
        assert site.output[1] in made
        for path in site.made:
            graph.get_submodule(path)
    assert all(path and reason for path, reason in report.rejected)
    assert PassReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@names
def test_without_inputs_it_says_that_nothing_was_verified(subject: Any, name: str) -> None:
    one, graph = subject(name)
    report = one.apply(graph)
    assert report.max_error is None
    assert report.before is None
    assert any("no example inputs" in note for note in report.notes)


@names
def test_verification_can_be_switched_off_and_made_full(subject: Any, name: str) -> None:
    one, graph = subject(name)
    off = one.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="off"))
    assert off.max_error is None
    assert any("switched off" in note for note in off.notes)
    full = one.apply(fork(graph), inputs=vectors(), settings=RunSettings(verify="full"))
    fast = one.apply(fork(graph), inputs=vectors())
    assert full.max_error is not None
    assert fast.max_error is not None
    assert full.max_error >= fast.max_error


@fits
def test_fitting_reports_and_dry_runs_do_not_fit(subject: Any, name: str) -> None:
    one, graph = subject(name)
    seen = []
    report = one.apply(
        fork(graph), inputs=vectors(), data=labelled_vectors(2), settings=RunSettings(progress=seen.append)
    )
    assert report.fit is not None
    seen = [moment for moment in seen if moment.what != "calibration"]
    assert report.fit.steps == len(seen) == 2
    assert all(name in moment.what for moment in seen)
    assert PassReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    dry = one.apply(fork(graph), inputs=vectors(), data=labelled_vectors(2), settings=RunSettings(dry_run=True))
    assert dry.fit is None
    assert dry.matched == report.matched


@names
def test_explain_is_what_apply_does(subject: Any, name: str) -> None:
    one, graph = subject(name)
    texts = node_texts(graph)
    matched, rejected = one.explain(graph)
    assert node_texts(graph) == texts
    report = one.apply(graph)
    assert [site.path for site in matched] == report.matched
    assert [(rejection.path, rejection.reason) for rejection in rejected] == report.rejected


@names
def test_options_survive_the_recipe(name: str) -> None:
    (one,) = build([name], {name: SUBJECTS[name].options})
    options = one.options()
    assert options == SUBJECTS[name].options
    (again,) = build([name], {name: json.loads(json.dumps(options))})
    assert again == one
    (typed,) = build([name], {name: {key: as_typed(value) for key, value in options.items()}})
    assert typed == one
    (default,) = build([name])
    assert default.options() == {}


def as_typed(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{pattern}:{one}" for pattern, one in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


@names
def test_options_have_help_and_the_pass_has_words(name: str) -> None:
    cls = PASSES[name]
    for option in dataclasses.fields(cls):
        assert option.metadata["help"].endswith("."), option.name
    assert cls.__doc__
    assert not cls.trains or cls.untrained or cls.needs_data
