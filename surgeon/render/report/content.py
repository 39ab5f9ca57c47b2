"""What stands in a report: the record of a surgery as words and rows for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.data.quality import Quality
from surgeon.display.words import seconds
from surgeon.jobs.report import Reported
from surgeon.jobs.sweep import Swept
from surgeon.measure.cost import Cost
from surgeon.measure.sweep import Point
from surgeon.passes.catalogue import all_about
from surgeon.passes.report import PassDiff, PassReport
from surgeon.render.report.figures import Figure, figures
from surgeon.render.report.graph import drawing
from surgeon.sites.rejection import CODES
from surgeon.surgery.recipe import Step
from surgeon.surgery.record import Record
from surgeon.text.diff import fitted, output_words, parameter_text
from surgeon.text.layout import MODEL
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.reasons import count_reasons
from surgeon.text.summary import change, growth, join_sites, natural, number, percent

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Part:
    """A part of a report: its id, its title, and a sentence under it."""

    id: str
    title: str
    words: str = ""


def section(surgery: Reported, place: str) -> dict[str, Any]:
    """Return what the template shows of one surgery. place: the id of its section."""
    record, diff = surgery.record, surgery.diff
    layers_header, layers = _layers(record)
    values = {
        "sparsity": _sparsity(record.passes),
        "left": _left(record.passes),
        "layers": layers,
        "search": _search(record),
    }
    found = figures(surgery)
    parts: list[Part | Figure] = [
        Part("done", "What was done"),
        Part("graph", "The graph", "Ops by module, before the first pass and after each. Changed ones are coloured."),
        Part("passes", "Pass by pass"),
        Part("layers", "Layers that skip", _skip_words(record)),
        *found,
        Part(
            "sparsity", "How sparse layers became", "Neurons above a hundredth of the token's largest, mean of tokens."
        ),
        Part("left", "Left alone, and why"),
        Part("search", "The search for settings"),
    ]
    return {
        "id": place,
        "name": surgery.name,
        "tiles": [{"name": name, "value": value, "note": note} for name, value, note in _tiles(surgery)],
        "facts": _facts(surgery),
        "drawing": drawing(diff),
        "passes": [_pass(pass_) for pass_ in diff.passes],
        "layers_header": layers_header,
        **values,
        "parts": [part for part in parts if values.get(part.id, True)],
    }


def side_by_side(surgeries: Sequence[Reported]) -> Rows:
    """Return the key figures of several surgeries, a row each."""
    tiles = [{name: f"{value} {note}".strip() for name, value, note in _tiles(one)} for one in surgeries]
    passes = ("passes", *(", ".join(step.name for step in one.record.recipe.passes) for one in surgeries))
    names = dict.fromkeys(name for one in tiles for name in one)
    return [*((name, *(one.get(name, "—") for one in tiles)) for name in names), passes]


def _tiles(surgery: Reported) -> list[tuple[str, str, str]]:
    record = surgery.record
    costs = [cost for report in record.passes for cost in (report.before, report.after) if cost is not None]
    found = []
    if (stored := _stored(surgery)) is not None:
        found.append((f"{stored.quality.name} as stored", *_quality_words(stored.quality)))
        if stored.relative is not None:
            layers = f"of dense; {percent(stored.layers)} of the converted layers"
            found.append(("multiply-adds that run, as stored", percent(stored.relative), layers))
    elif (quality := record.quality) is not None and (best := quality.after or quality.before) is not None:
        told = "of the surgery" if quality.after is not None else "of the dense model"
        found.append((f"{best.name} {told}", *_quality_words(best)))
    if costs:
        before, after = costs[0], costs[-1]
        grown = growth(before.multiply_adds, after.multiply_adds) or "as before"
        name, words = "multiply-adds if everything runs", f"{grown}, on the example inputs"
        found.append((name, number(after.multiply_adds), words))
        grown = growth(before.parameters, after.parameters) or "as before"
        found.append(("parameters", number(after.parameters), grown))
    if record.tau:
        values = sorted(record.tau.values())
        shown = f"{values[0]:.3g}" if values[0] == values[-1] else f"{values[0]:.3g} to {values[-1]:.3g}"
        found.append(("tau", shown, f"of {len(values)} layer{'s' * (len(values) > 1)}"))
    return found


def _stored(surgery: Reported) -> Point | None:
    """The stored setting, if it was measured."""
    swept = surgery.measured.get("pareto")
    if not isinstance(swept, Swept):
        return None
    tau = set(surgery.record.tau.values())
    own = [point for point in swept.points if point.router == "own"]
    return next((point for point in own if point.tau is None or {point.tau} == tau), None)


def _quality_words(quality: Quality) -> tuple[str, str]:
    moved = f", {change_words(quality.change)} from dense" if quality.change else ""
    return with_interval(quality), f"on {measured_on(quality)}{moved}"


def _facts(surgery: Reported) -> Rows:
    record = surgery.record
    found = [
        ("directory", str(surgery.path)),
        ("model", f"{record.input.path or 'made in Python'} ({record.input.kind})"),
        ("passes", ", ".join(map(_step_words, record.recipe.passes))),
        ("seed", str(record.recipe.seed)),
        ("data", record.recipe.data or "none"),
        ("time", seconds(sum(report.seconds for report in record.passes))),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("traced", f"{record.trace.form} form" + (f", task {record.trace.task}" if record.trace.task else "")),
        ("hash of the model file", record.model_sha256),
    ]
    if record.input.sha256:
        found.insert(2, ("hash of the model before", record.input.sha256))
    if record.recipe.teacher is not None:
        found.append(("teacher", record.recipe.teacher.path or "made in Python"))
    return [*found, *(("note", note) for note in record.trace.notes)]


def _step_words(step: Step) -> str:
    return step.name + (f" ({_options(step.options)})" if step.options else "")


def _options(options: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _pass(pass_: PassDiff) -> dict[str, Any]:
    report, graph = pass_.report, pass_.graph
    about = all_about().get(report.name)
    words, same = output_words(report)
    changes = graph.by_path()
    lines = [
        (path or MODEL, [(sign, node.text) for sign, node in changes[path]]) for path in sorted(changes, key=natural)
    ]
    parameters = [("-", parameter_text(one)) for one in graph.removed_parameters]
    parameters += [("+", parameter_text(one)) for one in graph.added_parameters]
    return {
        "name": report.name,
        "count": f"{len(report.matched)} of {len(report.matched) + len(report.rejected)} sites",
        "output": words,
        "output_kind": "good" if same else "moved",
        "time": seconds(report.seconds),
        "about": about.summary.replace("`", "") if about else "",
        "options": _options(report.options),
        "trained": fitted(report.fit) if report.fit is not None else "",
        "costs": _costs(report.before, report.after),
        "sites": [
            {
                "label": group.label or MODEL,
                "count": group.count,
                "before": group.change.before,
                "after": group.change.after,
                "parameters": change(*group.change.parameters),
                "multiply_adds": change(*group.change.multiply_adds),
            }
            for group in join_sites(report.sites)
        ],
        "notes": [*report.notes, *(() if report.after is None else report.after.notes)],
        "diff": [*lines, *([("parameters", parameters)] if parameters else [])],
        "diff_summary": f"{len(graph.removed)} ops removed, {len(graph.added)} added",
    }


def _costs(before: Cost | None, after: Cost | None) -> Rows:
    if before is None or after is None:
        return []
    rows: Rows = [
        (name, f"{change(old, new)} {growth(old, new)}".strip())
        for name, old, new in (
            ("parameters", before.parameters, after.parameters),
            ("multiply-adds", before.multiply_adds, after.multiply_adds),
        )
    ]
    if after.executed is not None:
        rows.append(("ran", f"{percent(after.executed)} of what can be skipped, on the example inputs"))
    return rows


def _left(reports: Sequence[PassReport]) -> Rows:
    return [
        (
            f"{reason.count} sites, first {reason.first}" if reason.count > 1 else reason.first or MODEL,
            report.name,
            reason.text,
            CODES.get(reason.code, "").replace("`", ""),
        )
        for report in reports
        for reason in count_reasons(report.rejected)
    ]


def _skip_words(record: Record) -> str:
    if any(record.tau.values()):
        return "A larger tau skips more."
    return "At tau 0 everything runs. A larger tau skips more: surgeon set stores one."


def _layers(record: Record) -> tuple[list[str], Rows]:
    header = ["layer", "what", "tau", "rule", "form"]
    rows: Rows = []
    for expert in record.experts:
        neurons, width = expert.expert_shape
        rows.append(
            (
                expert.path,
                f"{expert.experts} experts of {neurons} neurons, {width} inputs"
                + (", mean of the skipped added" if expert.path in record.compensated else ""),
                f"{record.tau[expert.path]:.4g}",
                record.rule.get(expert.path, ""),
                expert.form,
            )
        )
    for layer in record.inputs:
        what = f"{layer.neurons} neurons" if layer.neurons is not None else f"{layer.d_in} inputs"
        rows.append((layer.path, f"{what} → {layer.d_out}", f"{record.tau[layer.path]:.4g}", "", layer.form))
    lowered = {path for report in record.passes if report.name == "lower" for path in report.matched}
    for path, what in _places(record.passes).items():
        if path in record.tau:
            form = "dynamic" if path in lowered else "masked"
            rows.append((path, what, f"{record.tau[path]:.4g}", "", form))
    return header, rows


def _places(reports: Sequence[PassReport]) -> dict[str, str]:
    """What happens at the places that passes made for samples to leave and tokens to halt, by path."""
    words = {"early-exit": "samples leave", "halt-tokens": "tokens halt"}
    made = [(report, site) for report in reports if report.name in words for site in report.sites]
    return {path: f"{words[report.name]} behind {site.path}" for report, site in made for path in site.made}


def _sparsity(reports: Sequence[PassReport]) -> list[dict[str, Any]]:
    """The layers of the last pass that made them sparse."""
    fits = [report.fit for report in reports if report.fit is not None and report.fit.sparsity]
    if not fits:
        return []
    return [
        {
            "path": path,
            "before": round(100 * old.active, 2),
            "after": round(100 * new.active, 2),
            "before_words": percent(old.active),
            "after_words": percent(new.active),
        }
        for path, (old, new) in fits[-1].sparsity.items()
    ]


def _search(record: Record) -> Rows:
    if record.search is None:
        return []
    return [
        (
            trial.name + (", chosen" if trial.name == record.search.chosen else ""),
            str(trial.steps),
            trial.why if trial.loss is None else f"{trial.loss:.4g}",
        )
        for trial in record.search.trials
    ]
