"""The view of the pass-by-pass diff, on a terminal and as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.display.words import seconds
from surgeon.errors import UsageError
from surgeon.graph.snapshot import GraphDiff
from surgeon.measure.cost import Cost
from surgeon.passes.catalogue import all_about
from surgeon.passes.report import PassDiff, PassReport
from surgeon.sites.rejection import Rejection
from surgeon.text.layout import MODEL, Fitting, dim, grid, indented, refused, sentences
from surgeon.text.plain import plain_text
from surgeon.text.reasons import count_reasons
from surgeon.text.summary import (
    SiteGroup,
    change,
    growth,
    join_like,
    join_sites,
    natural,
    number,
    percent,
)
from surgeon.training.loop import FitReport
from surgeon.training.penalty import Sparsity

Detail = Literal["sites", "stat", "full"]


def diff_text(passes: Sequence[PassDiff], detail: Detail = "sites") -> str:
    """The pass-by-pass diff as plain text."""
    return plain_text(diff_view(passes, detail))


def diff_view(passes: Sequence[PassDiff], detail: Detail) -> RenderableType:
    """Show what each pass changed.

    Raises:
        UsageError: there is no such detail.
    """
    if detail not in get_args(Detail):
        raise UsageError(f"No detail {detail!r}. There are: {', '.join(get_args(Detail))}.")
    if detail == "stat":
        return stat_view([pass_.report for pass_ in passes])
    blocks: list[RenderableType] = []
    for pass_ in passes:
        blocks += [pass_view(pass_, detail), Text("")]
    return Group(*blocks[:-1])


def pass_view(pass_: PassDiff, detail: Detail, *, gap: bool = False) -> RenderableType:
    """Show what one pass did to the model and to each site, and why it left sites unchanged.

    gap: end with an empty line.
    """
    report = pass_.report
    lines: list[RenderableType] = [_pass_header(report)]
    if report.before is not None and report.after is not None:
        lines.append(_costs(report.before, report.after))
    if report.fit is not None:
        lines.append(indented(dim(fitted(report.fit))))
        if report.fit.sparsity:
            lines.append(indented(sparsity_view(report.fit.sparsity, detail)))
    if report.sites:
        groups = (
            [SiteGroup(site.path, site, 1) for site in report.sites] if detail == "full" else join_sites(report.sites)
        )
        lines.append(sites_view(groups))
    if report.rejected:
        lines.append(_refusals(report.rejected, detail))
    if detail == "full" and pass_.graph:
        lines.append(graph_diff_view(pass_.graph))
    lines.append(sentences([*report.notes, *(() if report.after is None else report.after.notes)]))
    return Group(*lines, *([Text("")] if gap else []))


def stat_view(reports: Sequence[PassReport]) -> RenderableType:
    """Show totals only, in a line for each pass."""
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
    """Show every node and parameter that was removed or added, by module path."""
    lines: list[RenderableType] = []
    changes = diff.by_path()
    for path in sorted(changes, key=natural):
        lines.append(Text(f"  {path or MODEL}", style="bold"))
        lines += [_signed(sign, node.text) for sign, node in changes[path]]
    if diff.removed_parameters or diff.added_parameters:
        lines.append(Text("  parameters", style="bold"))
        lines += [_signed("-", parameter_text(one)) for one in diff.removed_parameters]
        lines += [_signed("+", parameter_text(one)) for one in diff.added_parameters]
    return Group(*lines)


def parameter_text(parameter: tuple[str, tuple[int, ...]]) -> str:
    """`fc.weight [1536, 384]`."""
    name, shape = parameter
    return f"{name} [{', '.join(map(str, shape))}]"


def _signed(sign: str, line: str) -> Text:
    return Text(f"    {sign} {line}", style="red" if sign == "-" else "green")


def _pass_header(report: PassReport) -> Text:
    total = len(report.matched) + len(report.rejected)
    parts = [
        Text(report.name, style="bold cyan" if report.matched else "bold yellow"),
        Text(f"{len(report.matched)} of {total} sites"),
        _output(report),
        _training(report),
        dim(seconds(report.seconds)),
    ]
    return Text("  ").join(part for part in parts if part.plain)


def _output(report: PassReport, *, short: bool = False) -> Text:
    text, same = output_words(report, short=short)
    return Text(text, style="green" if same else "yellow")


def output_words(report: PassReport, *, short: bool = False) -> tuple[str, bool]:
    """What a pass did to the output, and whether it kept it."""
    if not report.matched:
        return "" if short else "nothing changed", False
    if report.max_error is None:
        return "not verified", False
    if report.preserved:
        text = f"same ({report.max_error:.0e})" if short else f"same output (differs by {report.max_error:.0e})"
        return text if report.max_error else "same" if short else "same output", True
    moved = percent(report.max_error) if report.max_error < 2 else f"{report.max_error:.2g}×"
    return f"moved {moved}" if short else f"output moved by {moved}", False


def _training(report: PassReport, *, short: bool = False) -> Text:
    if report.fit is not None:
        return Text(f"{report.fit.steps} steps" if report.fit.steps else "closed form") if short else Text("")
    about = all_about().get(report.name)
    if about is None or not report.matched:
        return Text("")
    # Whether a pass trains depends on its options. This note is there only if it should have trained.
    untrained = about.untrained in report.notes if about.untrained else about.needs_data and about.trains
    return Text("none" if short else "not trained", style="yellow") if untrained else Text("")


def fitted(fit: FitReport) -> str:
    """`trained 120 steps in 34 s: router loss 0.23 → 0.001`, or `fitted without training`."""
    if not fit.steps:
        return "fitted without training"
    text = f"trained {fit.steps} steps in {seconds(fit.seconds)}"
    if fit.resumed_at:
        text += f", resumed at {fit.resumed_at}"
    if not fit.losses:
        return text
    first, last = fit.losses[0][1], fit.losses[-1][1]
    return f"{text}: " + ", ".join(f"{name} {first.get(name, value):.3g} → {value:.3g}" for name, value in last.items())


def _costs(before: Cost, after: Cost) -> RenderableType:
    ran = ""
    if after.executed is not None:
        ran = f"{percent(after.executed)} of what can be skipped ran"
        if after.executed_multiply_adds != after.multiply_adds:
            ran += f", {number(after.executed_multiply_adds)} in all (example inputs, padding counted)"
    if (before.parameters, before.multiply_adds) == (after.parameters, after.multiply_adds):
        same = f"{number(after.parameters)} parameters, {number(after.multiply_adds)} multiply-adds"
        return indented(dim(f"{same}, {ran}" if ran else same))
    table = grid("left", "left", "left", "left")
    for name, old, new, note in (
        ("parameters", before.parameters, after.parameters, ""),
        ("multiply-adds", before.multiply_adds, after.multiply_adds, ran),
    ):
        table.add_row(dim(name), change(old, new), dim(growth(old, new)), note)
    return indented(table)


def sites_view(groups: Sequence[SiteGroup]) -> RenderableType:
    """Show a line for each group of sites, or three lines where the terminal is too narrow for one."""
    ran = any(group.change.executed is not None for group in groups)
    header = ["site", "was → is", "parameters", "mult-adds/token", "ran" if ran else ""]
    wide = grid("left", "left", "left", "left", "right", header=header)
    narrow: list[RenderableType] = []
    for group in groups:
        site, count = group.change, f"  ×{group.count}" if group.count > 1 else ""
        path = Text.assemble((group.label or MODEL, "cyan"), (count, "dim"))
        became = Text.assemble((site.before, "red"), " → ", (site.after, "green"))
        costs = change(*site.parameters), change(*site.multiply_adds)
        wide.add_row(path, became, *costs, percent(site.executed))
        share = "" if site.executed is None else f", {percent(site.executed)} ran"
        narrow += [
            path,
            indented(became),
            indented(dim(f"{costs[0]} parameters, {costs[1]} multiply-adds/token{share}")),
        ]
    return indented(Fitting(wide, Group(*narrow)))


def sparsity_view(sparsity: Mapping[str, tuple[Sparsity, Sparsity]], detail: Detail) -> RenderableType:
    """Show how sparse the activations of each layer are before and after training; like layers are joined."""
    parts: dict[str, Callable[[Sparsity], float]] = {
        "active": lambda sparse: sparse.active,
        "exactly zero": lambda sparse: sparse.zero,
    }
    if detail == "full":
        parts = {
            "exactly zero": lambda sparse: sparse.zero,
            "below 1/10": lambda sparse: sparse.below_10th,
            "below 1/100": lambda sparse: sparse.below_100th,
            "below 1/1000": lambda sparse: sparse.below_1000th,
        }
    rows = [
        (path, tuple(_moved(share(old), share(new)) for share in parts.values()))
        for path, (old, new) in sparsity.items()
    ]
    joined = [(path, 1, place) for place, (path, _) in enumerate(rows)] if detail == "full" else join_like(rows)
    columns: list[Literal["left", "right"]] = ["left"] * (1 + len(parts))
    table = grid(*columns, header=["neurons", *parts])
    for label, count, place in joined:
        path = Text.assemble((label or MODEL, "cyan"), (f"  ×{count}" if count > 1 else "", "dim"))
        table.add_row(path, *rows[place][1])
    below = "below: relative to" if detail == "full" else "active: above a hundredth of"
    more = "" if detail == "full" else " The full diff also shows a tenth and a thousandth."
    return Group(table, dim(f"{below} the token's largest value. Shares of the neurons, mean over tokens.{more}"))


def _moved(before: float, after: float) -> str:
    """`42% → 3.1%`, or one share if they look the same."""
    old, new = percent(before), percent(after)
    return old if old == new else f"{old} → {new}"


def _refusals(rejected: Sequence[Rejection], detail: Detail) -> RenderableType:
    """Show why sites were left unchanged: each site with its reason, or each reason once."""
    if detail == "full":
        lines = [(rejection.path or MODEL, rejection.reason) for rejection in rejected]
    else:
        lines = [
            (f"{reason.count} sites, first {reason.first}" if reason.count > 1 else reason.first or MODEL, reason.text)
            for reason in count_reasons(rejected)
        ]
    return Group(*(indented(refused(path, reason)) for path, reason in lines))
