"""The views of `surgeon passes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.passes.about import About
from surgeon.text.layout import dim, grid, heading, indented, sentences


def passes_view(passes: Iterable[About], recipes: Mapping[str, str], broken: Mapping[str, str]) -> RenderableType:
    """List the passes and recipes.

    broken: for each pass of another package that cannot be used, the reason.
    """
    table = grid("left", "left", "left", "left", header=("pass", "output", "data", "what it does"))
    for about in passes:
        data = "needed" if about.needs_data else _use_of_data(about)
        table.add_row(Text(about.name, style="bold cyan"), about.output, data, _first_sentence(about))
    named = grid("left", "left", header=("recipe", "several passes with their options"))
    for name, what in recipes.items():
        named.add_row(Text(name, style="bold cyan"), what)
    hint = (
        "surgeon passes NAME shows the options of a pass, and with --example what it changes in a small model. "
        "surgeon apply --recipe NAME runs a recipe."
    )
    notes = sentences([f"The pass '{name}' cannot be used: {why}." for name, why in broken.items()], indent=0)
    return Group(table, Text(""), named, Text(""), notes, Text(hint, style="dim"))


def pass_view(about: About) -> RenderableType:
    """Show what a pass does, what it needs and promises, and its options."""
    table = grid("left", "left", "left", "left", header=("option", "type", "default", ""))
    for option in about.options:
        default = "" if option.default in (None, ()) else _typed(option.default)
        table.add_row(Text(option.name, style="cyan"), option.type, default, option.help)
    facts = grid("left", "left")
    for name, value in _facts(about):
        facts.add_row(dim(name), value)
    return Group(
        heading(about.name),
        indented(Text(about.description)),
        Text(""),
        indented(facts),
        Text(""),
        heading("options", f"--set {about.name}.OPTION=VALUE"),
        indented(table),
    )


def _first_sentence(about: About) -> str:
    """The summary of a pass, without the reference in brackets at its end."""
    head, bracket, _ = about.summary.rpartition(" (D2DMoE")
    return f"{head}." if bracket else about.summary


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _use_of_data(about: About) -> str:
    return "to train" if about.trains else "to calibrate" if about.calibrates else ""


def _facts(about: About) -> list[tuple[str, str]]:
    """What a pass works on, what it makes, what it needs, and what it promises."""
    sites = {
        "ffn": "feed-forward layers",
        "linear": "standalone linear layers",
        "any-linear": "linear layers",
        "moe": "expert layers",
        "dynamic": "layers that skip by tau",
        "block": "blocks of classifiers",
        "stream": "residual streams and the values of attention",
    }
    facts = [("works on", sites[about.works_on])]
    if about.makes is not None:
        facts.append(("makes", sites[about.makes]))
    if about.must_precede:
        facts.append(("runs before", ", ".join(about.must_precede)))
    facts.append(("output", about.output))
    use = _use_of_data(about)
    facts.append(("data", "needed" if about.needs_data else f"optional, {use}" if use else "not used"))
    if about.untrained:
        facts.append(("without data", about.untrained))
    return facts
