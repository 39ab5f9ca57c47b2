"""How results look: from data to rich renderables, the same on a terminal and as plain text. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgeon.report import Cost, PassReport
from surgeon.summary import (
    SiteGroup,
    change,
    count_reasons,
    growth,
    join_like,
    join_sites,
    natural,
    number,
    percent,
    seconds,
)

if TYPE_CHECKING:
    from surgeon.diff import GraphDiff, PassDiff
    from surgeon.doctor import Check
    from surgeon.demo import Demo
    from surgeon.jobs import Applied, Comparison, Explanation, Inspection, Option
    from surgeon.losses import Quality
    from surgeon.passes import Pass
    from surgeon.sweep import Point

Detail = Literal["sites", "stat", "full"]
_MANY = 10_000
MODEL = "(the model itself)"


def grid(*columns: Literal["left", "right"], header: Sequence[str] = ()) -> Table:
    """An aligned table without lines."""
    table = Table(box=None, show_header=bool(header), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for index, justify in enumerate(columns):
        table.add_column(header[index] if header else "", justify=justify, overflow="fold")
    return table


def indented(content: RenderableType, by: int = 2) -> Padding:
    """Moved to the right, where it wraps as well."""
    return Padding(content, (0, 0, 0, by))


class Fitting:
    """The first of several forms that fits the width, else the last."""

    def __init__(self, *forms: RenderableType) -> None:
        self.forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.update(width=_MANY)
        fits = (form for form in self.forms if Measurement.get(console, room, form).maximum <= options.max_width)
        yield next(fits, self.forms[-1])


def heading(text: str, note: str = "") -> Text:
    """A bold line, with a note in the ordinary weight."""
    line = Text(text, style="bold")
    return line.append(f"  {note}", style="not bold dim") if note else line


def sentences(notes: Iterable[str], *, indent: int = 2, sign: str = "note: ") -> Group:
    """One paragraph each."""
    return Group(*(indented(Text.assemble((sign, "yellow"), note), indent) for note in notes))


# --- diff -------------------------------------------------------------------------------------------------------------


def diff_view(passes: Sequence[PassDiff], detail: Detail) -> RenderableType:
    """The pass-by-pass diff."""
    if detail == "stat":
        return stat_view([one.report for one in passes])
    blocks: list[RenderableType] = []
    for one in passes:
        blocks += [pass_view(one, detail), Text("")]
    return Group(*blocks[:-1])


def pass_view(one: PassDiff, detail: Detail, *, gap: bool = False) -> RenderableType:
    """One pass: what it did to the whole, a line for each site, and why sites were left as they were."""
    report = one.report
    lines: list[RenderableType] = [_pass_header(report)]
    if report.before is not None and report.after is not None:
        lines.append(_costs(report.before, report.after))
    if report.sites:
        groups = (
            [SiteGroup(site.path, site, 1) for site in report.sites] if detail == "full" else join_sites(report.sites)
        )
        lines.append(sites_view(groups))
    if report.rejected:
        lines.append(_left(report.rejected, detail))
    if detail == "full" and one.graph:
        lines.append(graph_diff_view(one.graph))
    lines.append(sentences(report.notes))
    return Group(*lines, *([Text("")] if gap else []))


def stat_view(reports: Sequence[PassReport]) -> RenderableType:
    """Totals only, a line for each pass."""
    columns: list[tuple[str, Literal["left", "right"], Callable[[PassReport], RenderableType]]] = [
        ("pass", "left", lambda report: Text(report.name, style="bold")),
        ("sites", "right", lambda report: f"{len(report.matched)}/{len(report.matched) + len(report.rejected)}"),
        ("parameters", "left", lambda report: _both(report, lambda cost: cost.parameters)),
        ("multiply-adds", "left", lambda report: _both(report, lambda cost: cost.multiply_adds)),
        ("ran", "right", lambda report: percent(report.after.executed) if report.after else ""),
        ("output", "left", lambda report: _output(report, short=True)),
        ("training", "left", lambda report: _training(report, short=True)),
        ("time", "right", lambda report: seconds(report.seconds)),
    ]

    def table(shown: Sequence[int]) -> Table:
        chosen = [columns[index] for index in shown]
        made = grid(*(justify for _, justify, _ in chosen), header=[name for name, _, _ in chosen])
        for report in reports:
            made.add_row(*(cell(report) for _, _, cell in chosen))
        return made

    return Fitting(table(range(8)), table(range(7)), table(range(6)))


def _both(report: PassReport, what: Callable[[Cost], int]) -> str:
    return change(what(report.before), what(report.after)) if report.before and report.after else ""


def graph_diff_view(diff: GraphDiff) -> RenderableType:
    """Every node and parameter that left or came, by module path."""
    lines: list[RenderableType] = []
    for path in sorted(diff.changes, key=natural):
        lines.append(Text(f"  {path or MODEL}", style="bold"))
        lines += [_signed(sign, line) for sign, line in diff.changes[path]]
    if diff.parameters:
        lines.append(Text("  parameters", style="bold"))
        lines += [_signed(sign, line) for sign, line in diff.parameters]
    return Group(*lines)


def _signed(sign: str, line: str) -> Text:
    return Text(f"    {sign} {line}", style="red" if sign == "-" else "green")


def _pass_header(report: PassReport) -> Text:
    total = len(report.matched) + len(report.rejected)
    line = Text(report.name, style="bold cyan" if report.matched else "bold yellow")
    parts = [
        Text(f"{len(report.matched)} of {total} sites", style="not bold"),
        _output(report),
        _training(report),
        Text(seconds(report.seconds)),
    ]
    for part in parts:
        if part.plain:
            line.append("  ", style="not bold").append_text(part)
    return line


def _output(report: PassReport, *, short: bool = False) -> Text:
    if not report.matched:
        return Text("" if short else "nothing changed", style="yellow")
    if report.max_error is None:
        return Text("not verified", style="yellow")
    if report.preserved:
        text = f"same ({report.max_error:.0e})" if short else f"same output (differs by {report.max_error:.0e})"
        return Text(text if report.max_error else "same" if short else "same output", style="green")
    moved = percent(report.max_error)
    return Text(f"moved {moved}" if short else f"output moved by {moved}", style="yellow")


def _training(report: PassReport, *, short: bool = False) -> Text:
    from surgeon.passes import PASSES

    kind = PASSES.get(report.name)
    if report.fit is None:
        untrained = bool(report.matched) and kind is not None and kind.trains
        return Text("none" if short else "not trained", style="yellow") if untrained else Text("")
    if short:
        return Text(f"{report.fit.steps} steps")
    text = f"trained {report.fit.steps} steps"
    if report.fit.losses:
        first, last = report.fit.losses[0][1], report.fit.losses[-1][1]
        text += ": " + ", ".join(f"{name} {first.get(name, value):.3g} → {value:.3g}" for name, value in last.items())
    return Text(text)


def _costs(before: Cost, after: Cost) -> RenderableType:
    ran = ""
    if after.executed is not None:
        ran = f"{percent(after.executed)} of the experts ran"
        if after.executed_multiply_adds != after.multiply_adds:
            ran += f", {number(after.executed_multiply_adds)} in all"
    if (before.parameters, before.multiply_adds) == (after.parameters, after.multiply_adds):
        same = f"{number(after.parameters)} parameters, {number(after.multiply_adds)} multiply-adds"
        return indented(_dim(f"{same}, {ran}" if ran else same))
    table = grid("left", "left", "left", "left")
    for name, old, new, note in (
        ("parameters", before.parameters, after.parameters, ""),
        ("multiply-adds", before.multiply_adds, after.multiply_adds, ran),
    ):
        table.add_row(_dim(name), change(old, new), _dim(growth(old, new)), note)
    return indented(table)


def sites_view(groups: Sequence[SiteGroup]) -> RenderableType:
    """A line for each group of sites, or three where the terminal is too narrow for one."""
    ran = any(group.change.executed is not None for group in groups)
    header = ["site", "", "was → is", "parameters", "mult-adds/token", "ran" if ran else ""]
    wide = grid("left", "right", "left", "left", "left", "right", header=header)
    narrow: list[RenderableType] = []
    for group in groups:
        site, count = group.change, f"×{group.count}" if group.count > 1 else ""
        path = Text(group.label or MODEL, style="cyan")
        became = Text.assemble((site.before, "red"), " → ", (site.after, "green"))
        costs = change(*site.parameters), change(*site.multiply_adds)
        wide.add_row(path, _dim(count), became, *costs, percent(site.executed))
        share = "" if site.executed is None else f", {percent(site.executed)} ran"
        narrow += [
            Text.assemble(path, ("  " + count, "dim")),
            indented(became),
            indented(_dim(f"{costs[0]} parameters, {costs[1]} multiply-adds/token{share}")),
        ]
    return indented(Fitting(wide, Group(*narrow)))


def _left(rejected: Sequence[tuple[str, str]], detail: Detail) -> RenderableType:
    """Why sites were left as they were: each with its reason, or each reason once."""
    if detail == "full":
        lines = [(path or MODEL, reason) for path, reason in rejected]
    else:
        lines = [
            (f"{reason.count} sites, first {reason.first}" if reason.count > 1 else reason.first or MODEL, reason.text)
            for reason in count_reasons(rejected)
        ]
    return Group(*(indented(Text.assemble("left ", (path, "cyan"), f": {reason}")) for path, reason in lines))


# --- apply ------------------------------------------------------------------------------------------------------------


def applied_view(applied: Applied) -> RenderableType:
    """What a run changed in all, where the result is, and what to do next. The passes were shown one by one."""
    before, after = applied.before, applied.after
    table = grid("left", "right", "right", "left", header=("", "before", "after", ""))
    table.add_row("parameters", number(before.parameters), number(after.parameters), _dim(growth(before.parameters, after.parameters)))
    table.add_row(
        "multiply-adds", number(before.multiply_adds), number(after.multiply_adds),
        _dim(growth(before.multiply_adds, after.multiply_adds)),
    )  # fmt: skip
    if after.executed is not None:
        share = percent(after.executed_multiply_adds / before.multiply_adds) if before.multiply_adds else ""
        table.add_row(
            "  that ran", number(before.executed_multiply_adds), number(after.executed_multiply_adds),
            _dim(f"{share} of before; {percent(after.executed)} of the experts"),
        )  # fmt: skip
    if applied.quality is not None:
        old, new = applied.quality
        table.add_row(old.name, f"{old.value:.4g}", f"{new.value:.4g}", _dim(f"on {new.items} {_items(new.name)}"))
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


def _items(quality_name: str) -> str:
    return "samples" if quality_name == "accuracy" else "tokens"


def _dim(text: str) -> Text:
    return Text(text, style="dim")


# --- inspect, explain, passes -----------------------------------------------------------------------------------------


def inspection_view(found: Inspection) -> RenderableType:
    """The sites of a model."""
    inputs = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in found.inputs.items())
    lines: list[RenderableType] = [heading(found.model, found.kind + (f", {found.task}" if found.task else ""))]
    table = grid("left", "left")
    table.add_row(_dim("parameters"), number(found.cost.parameters))
    table.add_row(_dim("multiply-adds"), f"{number(found.cost.multiply_adds)} for {inputs}")
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
    lines += [
        indented(Text.assemble("refused ", (path or MODEL, "cyan"), f": {reason}"))
        for path, reason in found.refused
    ]
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


def passes_view(passes: Iterable[type[Pass[Any]]]) -> RenderableType:
    """The list of passes."""
    table = grid("left", "left", "left", "left", header=("pass", "output", "data", "what it does"))
    for kind in passes:
        data = "needed" if kind.needs_data else "to train" if kind.trains else ""
        table.add_row(Text(kind.name, style="bold cyan"), promise(kind), data, first_sentence(kind))
    return Group(table, Text(""), Text("surgeon passes NAME shows a pass's options and an example.", style="dim"))


def pass_help_view(kind: type[Pass[Any]], options: Sequence[Option], example: PassDiff) -> RenderableType:
    """One pass: what it does, needs and promises, its options, and what it makes of a small model."""
    table = grid("left", "left", "left", "left", header=("option", "type", "default", ""))
    for option in options:
        default = "" if option.default in (None, ()) else str(option.default)
        table.add_row(Text(option.name, style="cyan"), option.type, default, option.help)
    facts = grid("left", "left")
    for name, value in pass_facts(kind):
        facts.add_row(_dim(name), value)
    shown = graph_diff_view(example.graph)
    return Group(
        heading(kind.name, first_sentence(kind)),
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


# --- diff of two, sweep, doctor ---------------------------------------------------------------------------------------


def comparison_view(found: Comparison, detail: Detail) -> RenderableType:
    """Two models side by side."""
    (first, second), (a, b) = found.names, found.costs
    table = grid("left", "right", "right", "left", header=("", first, second, ""))
    table.add_row("parameters", number(a.parameters), number(b.parameters), _dim(growth(a.parameters, b.parameters)))
    table.add_row("multiply-adds", number(a.multiply_adds), number(b.multiply_adds), _dim(growth(a.multiply_adds, b.multiply_adds)))
    if a.executed is not None or b.executed is not None:
        table.add_row(
            "  that ran", number(a.executed_multiply_adds), number(b.executed_multiply_adds),
            _dim(growth(a.executed_multiply_adds, b.executed_multiply_adds)),
        )  # fmt: skip
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
                _dim(f"×{count}" if count > 1 else ""),
                Text(old.what if old else "-", style="" if same else "red"),
                Text(new.what if new else "-", style="" if same else "green"),
                _pair(old and number(old.parameters), new and number(new.parameters)),
                _pair(old and number(old.multiply_adds), new and number(new.multiply_adds)),
                _pair(old and percent(old.executed), new and percent(new.executed)),
            )
        lines += [Text(""), table]
    if found.nodes is not None:
        lines += [Text(""), graph_diff_view(found.nodes)]
    return Group(*lines)


def _pair(old: str | None, new: str | None) -> str:
    if old == new:
        return old or ""
    return f"{old or '-'} → {new or '-'}"


def sweep_view(points: Sequence[Point], *, dense: tuple[float, int] | None = None) -> RenderableType:
    """Quality and cost at every tau. dense: quality and multiply-adds of the dense model, if its quality is known."""
    name = points[0].quality.name
    header = ("tau", name, "", "experts that ran", "multiply-adds", "of dense")
    table = grid("left", "right", "right", "right", "right", "right", header=header)
    base = points[0].quality.value if dense is None else dense[0]
    if dense is not None:
        table.add_row("dense", f"{dense[0]:.4g}", "", "", number(dense[1]), "100%")
    for point in points:
        value = point.quality.value
        moved = value - base
        worse = moved < 0 if point.quality.higher_is_better else moved > 0
        table.add_row(
            f"{point.tau:g}" + (" (all experts)" if point.tau == 0 else ""),
            f"{value:.4g}",
            Text(f"{moved:+.2g}" if moved else "", style="red" if worse else "green"),
            percent(point.executed),
            number(point.multiply_adds),
            percent(point.relative),
        )
    quality = points[0].quality
    measured = f"{name} on {quality.items} {_items(name)}; multiply-adds for the example inputs"
    return Group(table, _dim(measured))


def quality_line(what: str, quality: Quality) -> RenderableType:
    """`dense model: accuracy 0.97 on 360 samples`."""
    return Text.assemble((what, "bold"), f": {quality.name} {quality.value:.4g} on {quality.items} {_items(quality.name)}\n")


def demo_view(made: Demo) -> RenderableType:
    """Quality against cost, and where the result is."""
    before = made.surgery.reports[0].before
    dense = None if before is None else (made.dense.value, before.multiply_adds)
    return Group(
        sweep_view(made.points, dense=dense),
        Text.assemble("\nSaved to ", (str(made.directory), "bold"), ". Next, to see what was changed:"),
        Text(f"  surgeon diff {made.directory}", style="bold"),
    )


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

