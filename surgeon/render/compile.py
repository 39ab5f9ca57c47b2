"""The view of the result of `surgeon compile`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.compile import CompileResult
from surgeon.text.layout import code, dim, grid, sentences


def compile_view(found: CompileResult) -> RenderableType:
    """Show where the compiled model is, what it takes and returns, and how to run it."""
    table = grid("left", "left")
    table.add_row(dim("compiled"), f"in {found.seconds:.0f} s, {found.bytes / 1e6:.1f} MB")
    table.add_row(dim("takes"), Text(found.takes.words))
    table.add_row(dim("dtypes"), ", ".join(f"{name} {dtype}" for name, dtype in found.inputs.items()))
    table.add_row(dim("returns"), ", ".join(found.outputs))
    table.add_row(dim("off by"), f"{found.max_error:.1e} from the surgery, relative")
    if found.tau:
        table.add_row(dim("tau"), f"{len(found.tau)} constants, such as {next(iter(found.tau))}")
    lines: list[RenderableType] = [table]
    if found.notes:
        lines.append(sentences(found.notes, indent=0))
    lines.append(Text.assemble("Saved to ", (str(found.directory), "bold"), ". In Python, with torch alone:"))
    lines.append(Text(""))
    if found.library is not None:
        lines.append(code(f'torch.ops.load_library("{found.directory}/{found.library}")'))
    lines.append(code(f'model = torch._inductor.aoti_load_package("{found.directory}/model.pt2")'))
    return Group(*lines)
