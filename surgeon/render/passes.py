"""The view of the result of `surgeon passes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.passes import Option
from surgeon.passes import Pass
from surgeon.passes.report import PassDiff
from surgeon.text.diff import graph_diff_view, sites_view
from surgeon.text.layout import dim, grid, heading, indented, sentences
from surgeon.text.summary import SiteGroup


def passes_view(
    passes: Iterable[type[Pass[Any]]], recipes: Mapping[str, tuple[str, Any]], broken: Mapping[str, str]
) -> RenderableType:
    """List the passes and recipes.

    broken: for each pass of another package that cannot be used, the reason.
    """
    table = grid("left", "left", "left", "left", header=("pass", "output", "data", "what it does"))
    for kind in passes:
        data = "needed" if kind.needs_data else _use_of_data(kind)
        table.add_row(Text(kind.name, style="bold cyan"), promise(kind), data, first_sentence(kind))
    named = grid("left", "left", header=("recipe", "several passes with their options"))
    for name, (what, _) in recipes.items():
        named.add_row(Text(name, style="bold cyan"), what)
    hint = "surgeon passes NAME shows the options of a pass and an example. surgeon apply --recipe NAME runs a recipe."
    notes = sentences([f"The pass '{name}' cannot be used: {why}." for name, why in broken.items()], indent=0)
    return Group(table, Text(""), named, Text(""), notes, Text(hint, style="dim"))


def pass_help_view(
    kind: type[Pass[Any]], description: str, options: Sequence[Option], example: PassDiff
) -> RenderableType:
    """Show what a pass does, what it needs and promises, its options, and an example on a small model."""
    table = grid("left", "left", "left", "left", header=("option", "type", "default", ""))
    for option in options:
        default = "" if option.default in (None, ()) else _typed(option.default)
        table.add_row(Text(option.name, style="cyan"), option.type, default, option.help)
    facts = grid("left", "left")
    for name, value in pass_facts(kind):
        facts.add_row(dim(name), value)
    shown = graph_diff_view(example.graph)
    return Group(
        heading(kind.name),
        indented(Text(description)),
        Text(""),
        indented(facts),
        Text(""),
        heading("options", f"--set {kind.name}.OPTION=VALUE"),
        indented(table),
        Text(""),
        heading("example", "on a small model"),
        indented(sites_view([SiteGroup(site.path, site, 1) for site in example.report.sites]), 0),
        shown,
    )


def first_sentence(kind: type[Pass[Any]]) -> str:
    """The first paragraph of a pass's docstring, without the reference in brackets at its end."""
    text = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    head, bracket, _ = text.rpartition(" (D2DMoE")
    return f"{head}." if bracket else text


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def promise(kind: type[Pass[Any]]) -> str:
    """How a pass affects the model's output, in a few words."""
    if not kind.preserves:
        return "changes"
    return "stays" if kind().keeps_output(True) else "stays until trained"


def _use_of_data(kind: type[Pass[Any]]) -> str:
    return "to train" if kind.trains else "to calibrate" if kind.calibrates else ""


def pass_facts(kind: type[Pass[Any]]) -> list[tuple[str, str]]:
    """What a pass works on, what it makes, what it needs, and what it promises."""
    sites = {"ffn": "feed-forward layers", "linear": "standalone linear layers", "moe": "expert layers"}
    facts = [("works on", sites[kind.works_on])]
    if kind.makes is not None:
        facts.append(("makes", sites[kind.makes]))
    if kind.must_precede:
        facts.append(("runs before", ", ".join(sorted(kind.must_precede))))
    facts.append(("output", promise(kind)))
    use = _use_of_data(kind)
    facts.append(("data", "needed" if kind.needs_data else f"optional, {use}" if use else "not used"))
    if kind.untrained:
        facts.append(("without data", kind.untrained))
    return facts
