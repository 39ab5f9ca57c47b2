"""The model card of an exported model: what was done to it, what was measured, and how to load it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from surgeon.dynamic.knobs import get_rule
from surgeon.dynamic.site import DynamicSite, tau_of
from surgeon.grafting.parts import GRAFT, Graft
from surgeon.graph.calls import as_args_kwargs
from surgeon.inputs.neuron_site import find_sparse_neurons
from surgeon.inputs.site import find_sparse_linears
from surgeon.moe.site import find_moes
from surgeon.passes.report import PassReport
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import MeasuredQuality, Record
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.summary import number
from surgeon.version import __version__

log = logging.getLogger("surgeon")


def model_card(model: Any, record: Record, origin: Origin, inputs: Any) -> str:
    """Write the card of a grafted model, in Markdown with the hub's metadata on top."""
    base = _base_card(record, origin)
    name = getattr(origin.config, "name_or_path", "") or (Path(record.input.path).name if record.input.path else "")
    data = ModelCardData(
        library_name="transformers",
        license=getattr(base, "license", None),
        license_name=getattr(base, "license_name", None),
        license_link=getattr(base, "license_link", None),
        language=getattr(base, "language", None),
        base_model=name if "/" in name and not Path(name).exists() else None,
        pipeline_tag=getattr(base, "pipeline_tag", None),
        tags=["surgeon", "dynamic-inference", *(["mixture-of-experts"] if find_moes(model) else [])],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {type(model).__name__} that skips {_kinds(model)}",
        _what(model, record),
        "## Load it\n\n" + _load(model, inputs),
        "## What was done\n\n" + _passes(record),
        "## Cost and quality\n\n" + _measured(record),
        _dense(model),
        "## Limits\n\n" + _limits(record),
        "## Licence\n\n" + _licence(base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(model: Any, record: Record) -> str:
    moes, linears, neurons = find_moes(model), find_sparse_linears(model), find_sparse_neurons(model)
    start = f"It started from `{Path(record.input.path).name}`." if record.input.path else "It was made in Python."
    if not moes and not linears and not neurons:
        return f"{start} No layer of it skips anything."
    parts = [start]
    if moes:
        rules = ", ".join(sorted(set(get_rule(model).values())))
        parts.append(
            f"surgeon {__version__} split {len(moes)} of its layers into experts, {moes[0].describe} in the first. For "
            "each token a layer runs only the experts whose predicted output is large enough. The threshold is "
            f"tau = {_range(moes)} (rule {rules}): 0 runs every expert, and larger values are cheaper."
        )
    if linears:
        parts.append(
            f"surgeon {__version__} lets {len(linears)} of its linear layers skip, for each token, the inputs that "
            f"matter least, {linears[0].describe} in the first. About a share tau = {_range(linears)} of the inputs is "
            "skipped: 0 reads all of them."
        )
    if neurons:
        parts.append(
            f"surgeon {__version__} lets {len(neurons)} of its gated layers skip, for each token, the neurons whose "
            f"gate is near zero, {neurons[0].describe} in the first. About a share tau = {_range(neurons)} "
            "of the neurons is skipped: 0 computes all of them."
        )
    return " ".join([*parts, "tau can be set at any time, without retraining."])


def _range(sites: Sequence[DynamicSite]) -> str:
    taus = sorted({tau_of(site) for site in sites})
    return f"{taus[0]:.3g}" if len(taus) == 1 else f"{taus[0]:.3g} to {taus[-1]:.3g}"


def _kinds(model: Any) -> str:
    """What the model skips, in words."""
    found = {"experts": find_moes(model), "inputs": find_sparse_linears(model), "neurons": find_sparse_neurons(model)}
    return " and ".join(name for name, sites in found.items() if sites) or "nothing"


def _load(model: Any, inputs: Any) -> str:
    _, kwargs = as_args_kwargs(inputs)
    kind = type(model).__name__
    names = ", ".join(kwargs)
    return (
        "```python\nimport surgeon  # before from_pretrained: it knows the format\n"
        f"from transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("PATH")\n'
        "surgeon.set_tau(model, 0.1)\n```\n\n"
        f"The model is an ordinary {kind}"
        + (f", measured with the inputs {names}" if names else "")
        + ". Without `import surgeon`, transformers only warns of an unknown quantization type. It then fills the "
        "converted layers with random weights, and the outputs mean nothing."
    )


def _passes(record: Record) -> str:
    rows = ["| pass | options | layers | parameters | multiply-adds |", "| --- | --- | --- | --- | --- |"]
    for report, step in zip(record.passes, record.recipe.passes, strict=True):
        options = ", ".join(f"{name}={value}" for name, value in step.options.items()) or "default"
        rows.append(f"| {report.name} | {options} | {len(report.sites)} | {_change(report)} |")
    trained = f"Data: {record.recipe.data}." if record.recipe.data else "No data was used: nothing was trained."
    if record.recipe.teacher is not None:
        path = record.recipe.teacher.path
        name = f"`{Path(path).name}`" if path else "a model made in Python"
        trained += f" Distilled from {name}, not from the model itself."
    return "\n".join(rows) + f"\n\nSeed {record.recipe.seed}. {trained}"


def _change(report: PassReport) -> str:
    if report.before is None or report.after is None:
        return "| "
    before, after = report.before, report.after
    return (
        f"{number(before.parameters)} → {number(after.parameters)} | "
        f"{number(before.executed_multiply_adds)} → {number(after.executed_multiply_adds)}"
    )


def _measured(record: Record) -> str:
    lines = []
    costs = [report for report in record.passes if report.before is not None and report.after is not None]
    if costs:
        first, last = costs[0].before, costs[-1].after
        assert first is not None
        assert last is not None
        share = last.executed_multiply_adds / max(1, first.executed_multiply_adds)
        lines.append(
            f"- Multiply-adds on the example inputs: {share:.1%} of the dense model's, at the tau of the passes."
        )
    lines.append(_quality(record.quality))
    return "\n".join(lines)


def _quality(quality: MeasuredQuality | None) -> str:
    if quality is None:
        return "- Quality was not measured."
    lines = []
    for what, measured in (("the dense model", quality.before), ("this model", quality.after)):
        if measured is not None:
            change = change_words(measured.change)
            lines.append(
                f"- Quality of {what}: {measured.name} {with_interval(measured)}, on {measured_on(measured)}"
                + (f"; difference from the dense model: {change}." if change else ".")
            )
    for agreement in quality.agreement:
        shown = f"{agreement.name} {with_interval(agreement)}, on {measured_on(agreement)}"
        lines.append(f"- Agreement with the dense model: {shown}.")
    if quality.after is None and not quality.agreement:
        lines.append("- The knobs were changed since, and the quality was not measured again.")
    return "\n".join([*lines, "- In brackets: 95% intervals."])


def _dense(model: Any) -> str:
    graft: Graft = getattr(model, GRAFT)
    if not graft.refused:
        return ""
    lines = [f"- `{rejection.path}`: {rejection.reason} (`{rejection.code}`)" for rejection in graft.refused]
    return "## Layers that stay dense\n\n" + "\n".join(lines)


def _limits(record: Record) -> str:
    return (
        f"The conversion was checked on inputs `{record.trace.sizes}`. The model itself takes what its class takes. "
        "Its quality holds for data like those it was measured on."
    )


def _base_card(record: Record, origin: Origin) -> Any:
    """The metadata of the base model's card, None if it has none that can be read."""
    places = [record.input.path, getattr(origin.config, "name_or_path", None)]
    card = next(
        (Path(place) / "README.md" for place in places if place and (Path(place) / "README.md").is_file()), None
    )
    if card is None:
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # a card that people wrote by hand; its licence is then not known
        log.warning("The metadata of %s cannot be read, so the new card names no licence.", card)
        return None


def _licence(base: Any) -> str:
    licence = getattr(base, "license", None)
    if licence is None:
        return "The base model's directory names no licence. The licence of the base model holds for this one too."
    return f"As the base model: {getattr(base, 'license_name', None) or licence}."
