"""The view of the result of `surgeon export`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.export import Exported, ExportedForEngine
from surgeon.surgery.engines import loading
from surgeon.text.layout import code, dim, grid, sentences
from surgeon.text.summary import join_like


def export_view(found: Exported) -> RenderableType:
    """Show which layers are converted, which stay dense, and how to load the model."""
    lines: list[RenderableType] = [
        Text.assemble((found.model_class, "bold"), f", {found.bytes / 1e6:.1f} MB of weights. Converted layers:")
    ]
    whats = {path: layer.what for path, layer in found.layers.items()}
    for label, count, first in join_like(whats.items()):
        what = list(whats.values())[first]
        lines.append(Text.assemble("  ", (label, "cyan"), f"  {what}", f"  ({count} layers)" if count > 1 else ""))
    if found.refused:
        reasons = [f"{rejection.path} stays dense: {rejection.reason}." for rejection in found.refused]
        lines.append(sentences(tuple(reasons), indent=0))
    if found.kept:
        lines.append(Text(f"{len(found.kept)} weights that the surgery does not use are the original model's."))
    lines.append(Text.assemble("Saved to ", (str(found.directory), "bold"), ". To load it:"))
    lines.append(
        code(f'import surgeon, transformers\ntransformers.{found.model_class}.from_pretrained("{found.directory}")')
    )
    return Group(*lines)


def engine_view(found: ExportedForEngine) -> RenderableType:
    """Show what the model takes and returns, how far it is from the surgery, and how to load it."""
    made, table = found.made, grid("left", "left")
    table.add_row(dim("size"), f"{made.bytes / 1e6:.1f} MB, linears outside of experts: {made.linears}")
    table.add_row(dim("takes"), ", ".join(made.inputs))
    table.add_row(dim("returns"), ", ".join(made.outputs))
    off = f"{made.error:.1e} from the surgery, relative"
    table.add_row(dim("off by"), off if made.linears == "float" else f"{off} ({made.float_error:.1e} in float)")
    lines: list[RenderableType] = [table]
    if found.notes:
        lines.append(sentences(found.notes, indent=0))
    lines += [Text.assemble("Saved to ", (str(found.directory), "bold"), ". To load it, without surgeon:"), Text("")]
    lines.append(code(loading(made, str(found.directory))))
    return Group(*lines)
