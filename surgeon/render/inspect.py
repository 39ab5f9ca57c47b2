"""How the answers of the commands look, on a terminal and as plain text. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.render.sweep import items_of, quality_value
from surgeon.text.diff import Detail, graph_diff_view, sites_view
from surgeon.text.layout import MODEL, dim, grid, heading, indented, refused, sentences
from surgeon.text.summary import SiteGroup, growth, join_like, number, percent, seconds

if TYPE_CHECKING:
    from surgeon.graph.snapshot import PassDiff
    from surgeon.jobs.apply import Applied
    from surgeon.jobs.diff import Comparison, SiteSide
    from surgeon.jobs.doctor import Check
    from surgeon.jobs.inspect import Explanation, Inspection
    from surgeon.jobs.pass_help import Option
    from surgeon.passes import Pass


# --- apply ------------------------------------------------------------------------------------------------------------


def applied_view(applied: Applied) -> RenderableType:
    """What a run changed in all, where the result is, and what to do next. The passes were shown one by one."""
    before, after = applied.before, applied.after
    table = grid("left", "right", "right", "left", header=("", "before", "after", ""))
    _add_numbers(table, "parameters", before.parameters, after.parameters)
    _add_numbers(table, "multiply-adds", before.multiply_adds, after.multiply_adds)
    if after.executed is not None:
        share = percent(after.executed_multiply_adds / before.multiply_adds) if before.multiply_adds else ""
        table.add_row(
            "  that ran", number(before.executed_multiply_adds), number(after.executed_multiply_adds),
            dim(f"{share} of before; {percent(after.executed)} of the experts (example inputs, padding counted)"),
        )  # fmt: skip
    if applied.quality is not None:
        old, new = applied.quality
        table.add_row(old.name, quality_value(old), quality_value(new), dim(f"on {new.items} {items_of(new.name)}"))
    lines: list[RenderableType] = [table, sentences(applied.notes, indent=0)]
    time_taken = seconds(applied.seconds)
    if applied.directory is None:
        lines.append(Text(f"Dry run, {time_taken}: nothing was trained and nothing was saved."))
    else:
        lines.append(Text.assemble("Saved to ", (str(applied.directory), "bold"), f" in {time_taken}."))
    command, purpose = applied.next
    lines.append(Text.assemble("Next, ", purpose, ":"))
    lines.append(Text(f"  {command}", style="bold", no_wrap=True, overflow="ignore"))
    return Group(*lines)


def _add_numbers(table: Table, name: str, before: int, after: int) -> None:
    table.add_row(name, number(before), number(after), dim(growth(before, after)))


# --- inspect, explain, passes -----------------------------------------------------------------------------------------


def inspection_view(found: Inspection) -> RenderableType:
    """The sites of a model."""
    inputs = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in found.inputs.items())
    lines: list[RenderableType] = [heading(found.model, found.kind + (f", {found.task}" if found.task else ""))]
    table = grid("left", "left")
    table.add_row(dim("parameters"), number(found.cost.parameters))
    table.add_row(dim("multiply-adds"), f"{number(found.cost.multiply_adds)} for {inputs}")
    lines += [indented(table), Text("")]
    if found.experts:
        lines.append(heading(f"{len(found.experts)} expert layers", f"{_share(found.experts)} of the multiply-adds"))
        table = grid(
            "left", "left", "left", "right", "right", "right", header=("path", "experts", "form", "tau", "ran", "share")
        )
        for layer in found.experts:
            shape = f"{layer.shape[0]} × {layer.shape[1]}"
            table.add_row(
                Text(layer.path, style="cyan"), shape, layer.form, f"{layer.tau:g}", percent(layer.executed),
                percent(layer.share),
            )  # fmt: skip
        lines += [indented(table), Text("")]
    lines.append(_count_heading(len(found.ffns), "feed-forward layer", _share(found.ffns)))
    if found.ffns:
        table = grid("left", "left", "left", "left", "right", header=("path", "shape", "activation", "", "share"))
        for ffn in found.ffns:
            what = [*(["gated"] if ffn.gated else []), *([f"used {ffn.calls} times"] if ffn.calls > 1 else [])]
            table.add_row(
                Text(ffn.path or MODEL, style="cyan"), "→".join(map(str, ffn.shape)), ffn.activation,
                ", ".join(what), percent(ffn.share),
            )  # fmt: skip
        lines.append(indented(table))
    lines += [indented(refused(path or MODEL, reason)) for path, reason in found.refused]
    lines += [Text(""), _count_heading(len(found.linears), "standalone linear layer", _share(found.linears))]
    if found.linears:
        table = grid("right", "left", "left", "right")
        groups: dict[tuple[object, ...], list[Any]] = {}
        for linear in found.linears:
            tail = linear.path.rpartition(".")[2]
            groups.setdefault((linear.shape, tail), []).append(linear)
        for same in groups.values():
            first = same[0]
            where = first.path if len(same) == 1 else f"{first.path}, …"
            table.add_row(f"{len(same)} ×", "→".join(map(str, first.shape)), Text(where, style="cyan"), _share(same))
        lines.append(indented(table))
    if found.notes:
        lines += [Text(""), sentences(found.notes, indent=0)]
    if found.graph is not None:
        lines += [Text(""), heading("graph", f"{len(found.graph)} operations by module path"), _graph(found.graph)]
    return Group(*lines)


def _count_heading(count: int, what: str, share: str) -> Text:
    if not count:
        return heading(f"no {what}")
    return heading(f"{count} {what}{'s' if count > 1 else ''}", f"{share} of the multiply-adds")


def _share(layers: Sequence[Any]) -> str:
    return percent(sum(layer.share for layer in layers))


def _graph(nodes: Sequence[tuple[str, str]]) -> RenderableType:
    lines, current = [], None
    for path, line in nodes:
        if path != current:
            lines.append(Text(f"  {path or MODEL}", style="cyan"))
            current = path
        lines.append(Text(f"    {line}"))
    return Group(*lines)


def explanation_view(passes: Sequence[Explanation]) -> RenderableType:
    """For every pass, each candidate: changed, or why not."""
    lines: list[RenderableType] = []
    for one in passes:
        total = len(one.matched) + len(one.rejected)
        if not total:
            lines += [heading(one.name, f"finds no {one.looks_for}"), Text("")]
            continue
        lines.append(heading(one.name, f"changes {len(one.matched)} of {total} candidates"))
        table = grid("left", "left", "left")
        for path, what in one.matched:
            table.add_row(Text("✓", style="green"), Text(path or MODEL, style="cyan"), what)
        for path, reason in one.rejected:
            table.add_row(Text("✗", style="red"), Text(path or MODEL, style="cyan"), reason)
        lines += [indented(table), Text("")]
    return Group(*lines[:-1])


def passes_view(passes: Iterable[type[Pass[Any]]], recipes: Mapping[str, tuple[str, Any]]) -> RenderableType:
    """The list of passes and of recipes."""
    table = grid("left", "left", "left", "left", header=("pass", "output", "data", "what it does"))
    for kind in passes:
        data = "needed" if kind.needs_data else "to train" if kind.trains else ""
        table.add_row(Text(kind.name, style="bold cyan"), promise(kind), data, first_sentence(kind))
    named = grid("left", "left", header=("recipe", "several passes with their options"))
    for name, (what, _) in recipes.items():
        named.add_row(Text(name, style="bold cyan"), what)
    hint = "surgeon passes NAME shows a pass's options and an example; surgeon apply --recipe NAME runs a recipe."
    return Group(table, Text(""), named, Text(""), Text(hint, style="dim"))


def pass_help_view(
    kind: type[Pass[Any]], description: str, options: Sequence[Option], example: PassDiff
) -> RenderableType:
    """One pass: what it does, needs and promises, its options, and what it makes of a small model."""
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
    """A value as it would be typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def promise(kind: type[Pass[Any]]) -> str:
    """What a pass does to the model's output, in a few words."""
    if not kind.preserves:
        return "changes"
    return "stays" if kind().keeps_output(True) else "stays until trained"


def pass_facts(kind: type[Pass[Any]]) -> list[tuple[str, str]]:
    """What a pass works on, makes, needs and promises."""
    sites = {"ffn": "feed-forward layers", "linear": "standalone linear layers", "moe": "expert layers"}
    facts = [("works on", sites[kind.works_on])]
    if kind.makes is not None:
        facts.append(("makes", sites[kind.makes]))
    if kind.must_precede:
        facts.append(("runs before", ", ".join(sorted(kind.must_precede))))
    facts.append(("output", promise(kind)))
    facts.append(("data", "needed" if kind.needs_data else "optional, to train" if kind.trains else "not used"))
    if kind.untrained:
        facts.append(("without data", kind.untrained))
    return facts


# --- diff of two, doctor --------------------------------------------------------------------------------------


def comparison_view(found: Comparison, detail: Detail) -> RenderableType:
    """Two models side by side."""
    (first, second), (a, b) = found.names, found.costs
    table = grid("left", "right", "right", "left", header=("", first, second, ""))
    _add_numbers(table, "parameters", a.parameters, b.parameters)
    _add_numbers(table, "multiply-adds", a.multiply_adds, b.multiply_adds)
    if a.executed is not None or b.executed is not None:
        _add_numbers(table, "  that ran", a.executed_multiply_adds, b.executed_multiply_adds)
        table.add_row("  experts that ran", percent(a.executed) or "-", percent(b.executed) or "-", "")
    lines: list[RenderableType] = [table]
    if found.difference is not None:
        lines.append(Text(f"The outputs differ by {found.difference:.1e}, relative, on {first}'s example inputs."))
    if found.note:
        lines.append(sentences([found.note], indent=0))
    if detail != "stat" and found.sites:
        header = ("site", "", first, second, "parameters", "mult-adds/token", "ran")
        table = grid("left", "right", "left", "left", "left", "left", "left", header=header)
        rows = list(found.sites.items())
        joined = [(path, 1, place) for place, (path, _) in enumerate(rows)] if detail == "full" else join_like(rows)
        for label, count, place in joined:
            old, new = rows[place][1]
            same = old is not None and new is not None and old.what == new.what
            table.add_row(
                Text(label or MODEL, style="cyan"),
                dim(f"×{count}" if count > 1 else ""),
                Text(old.what if old else "-", style="" if same else "red"),
                Text(new.what if new else "-", style="" if same else "green"),
                _pair(old, new, lambda side: number(side.parameters)),
                _pair(old, new, lambda side: number(side.multiply_adds)),
                _pair(old, new, lambda side: percent(side.executed)),
            )
        lines += [Text(""), table]
    if found.nodes is not None:
        lines += [Text(""), graph_diff_view(found.nodes)]
    return Group(*lines)


def _pair(old: SiteSide | None, new: SiteSide | None, what: Callable[[SiteSide], str]) -> str:
    before, after = (what(side) if side is not None else "" for side in (old, new))
    return before if before == after else f"{before or '-'} → {after or '-'}"


def doctor_view(checks: Sequence[Check]) -> RenderableType:
    """What was checked and found, and what to do about what is wrong."""
    signs = {"ok": Text("✓", style="green"), "note": Text("·", style="dim"), "failed": Text("✗", style="bold red")}
    table = grid("left", "left", "left")
    for check in checks:
        table.add_row(signs[check.state], check.name, check.found)
        if check.advice:
            table.add_row("", "", Text(check.advice, style="yellow" if check.state == "failed" else "dim"))
    failed = Counter(check.state for check in checks)["failed"]
    end = Text("Everything works.", style="green") if not failed else Text(f"{failed} problem(s) found.", style="red")
    return Group(table, end)
