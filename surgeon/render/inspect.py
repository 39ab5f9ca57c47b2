"""The view of the result of `surgeon inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.graph.snapshot import NodeRecord
from surgeon.jobs.inspect import DynamicLayer, Inspection
from surgeon.text.layout import MODEL, dim, grid, heading, indented, refused, sentences
from surgeon.text.summary import number, percent


def inspection_view(found: Inspection) -> RenderableType:
    """Show the sites of a model."""
    inputs = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in found.inputs.items())
    lines: list[RenderableType] = [heading(found.model, found.kind + (f", {found.task}" if found.task else ""))]
    table = grid("left", "left")
    table.add_row(dim("parameters"), number(found.cost.parameters))
    table.add_row(dim("multiply-adds"), f"{number(found.cost.multiply_adds)} for {inputs}")
    # As text: in markup, brackets are styles.
    table.add_row(dim("takes"), Text(found.takes.words))
    if found.takes.untraced:
        table.add_row(dim("not traced"), ", ".join(found.takes.untraced))
    lines += [indented(table), Text("")]
    for layers, called, between in (
        (found.experts, "expert layer", " × "),
        ([layer for layer in found.skipping if len(layer.shape) == 2], "input-skipping linear layer", "→"),
        ([layer for layer in found.skipping if len(layer.shape) == 3], "neuron-skipping layer", "→"),
        (found.exits, "early exit", ", "),
        (found.halting, "halting place", ", "),
    ):
        if layers:
            lines += [
                _count_heading(len(layers), called, _share(layers)),
                indented(_dynamic(layers, between)),
                Text(""),
            ]
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
    lines += [indented(refused(one.path or MODEL, one.reason)) for one in found.refused]
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


def _dynamic(layers: Sequence[DynamicLayer], between: str) -> RenderableType:
    """A table of layers that skip by tau. between: what stands between the numbers of a shape."""
    header = ("path", "shape", "form", "tau", "ran", "share")
    table = grid("left", "left", "left", "right", "right", "right", header=header)
    for layer in layers:
        table.add_row(
            Text(layer.path, style="cyan"), between.join(map(str, layer.shape)), layer.form, f"{layer.tau:g}",
            percent(layer.executed), percent(layer.share),
        )  # fmt: skip
    return table


def _count_heading(count: int, what: str, share: str) -> Text:
    if not count:
        return heading(f"no {what}")
    return heading(f"{count} {what}{'s' if count > 1 else ''}", f"{share} of the multiply-adds")


def _share(layers: Sequence[Any]) -> str:
    return percent(sum(layer.share for layer in layers))


def _graph(nodes: Sequence[NodeRecord]) -> RenderableType:
    lines, current = [], None
    for node in nodes:
        if node.path != current:
            lines.append(Text(f"  {node.path or MODEL}", style="cyan"))
            current = node.path
        lines.append(Text(f"    {node.text}"))
    return Group(*lines)
