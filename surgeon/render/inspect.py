"""The view of the result of `surgeon inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.inspect import Inspection
from surgeon.text.layout import MODEL, dim, grid, heading, indented, refused, sentences
from surgeon.text.summary import number, percent


def inspection_view(found: Inspection) -> RenderableType:
    """Show the sites of a model."""
    inputs = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in found.inputs.items())
    lines: list[RenderableType] = [heading(found.model, found.kind + (f", {found.task}" if found.task else ""))]
    table = grid("left", "left")
    table.add_row(dim("parameters"), number(found.cost.parameters))
    table.add_row(dim("multiply-adds"), f"{number(found.cost.multiply_adds)} for {inputs}")
    sizes = [*(f"{name} {size}" for name, size in found.takes.sizes.items()), *found.takes.rules]
    # As text: in markup, brackets are styles.
    table.add_row(dim("takes"), Text("; ".join([", ".join(found.takes.inputs), *sizes])))
    if found.takes.untraced:
        table.add_row(dim("not traced"), ", ".join(found.takes.untraced))
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
    if found.skipping:
        count = len(found.skipping)
        lines.append(
            heading(
                f"{count} linear layer{'s skip' if count > 1 else ' skips'} inputs",
                f"{_share(found.skipping)} of the multiply-adds",
            )
        )
        table = grid(
            "left", "left", "left", "right", "right", "right", header=("path", "shape", "form", "tau", "ran", "share")
        )
        for one in found.skipping:
            table.add_row(
                Text(one.path, style="cyan"), "→".join(map(str, one.shape)), one.form, f"{one.tau:g}",
                percent(one.executed), percent(one.share),
            )  # fmt: skip
        lines += [indented(table), Text("")]
    if found.exits:
        lines.append(_count_heading(len(found.exits), "early exit", _share(found.exits)))
        table = grid("left", "left", "right", "right", "right", header=("path", "form", "tau", "ran", "share"))
        for place in found.exits:
            table.add_row(
                Text(place.path, style="cyan"), place.form, f"{place.tau:g}", percent(place.executed),
                percent(place.share),
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
