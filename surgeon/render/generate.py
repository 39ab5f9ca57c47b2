"""The view of the result of `surgeon generate`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.generate import Generated, Setting
from surgeon.text.layout import grid, sentences
from surgeon.text.summary import percent


def generate_view(found: Generated) -> RenderableType:
    """Show what each setting wrote, each text once, and the speed of all."""
    texts: dict[str, list[str]] = {}
    for setting in found.settings:
        texts.setdefault(setting.text, []).append(_name(setting))
    table = grid(
        *(["right"] * 5),  # type: ignore[arg-type]
        header=["", "ran", "tokens/s", "of dense", "same tokens"],
    )
    for setting in found.settings:
        table.add_row(
            _name(setting),
            percent(setting.executed),
            f"{setting.tokens_per_second:.1f}",
            "" if setting.ratio is None else f"{setting.ratio:.2f}×",
            "" if setting.same is None else f"{setting.same} of {setting.tokens}",
        )
    lines: list[RenderableType] = []
    for text, names in texts.items():
        if len(found.settings) > 1:
            lines.append(Text(f"{', '.join(names)}:", style="dim"))
        lines += [Text.assemble((found.prompt, "bold"), text), Text()]
    return Group(*lines, table, sentences(found.notes, indent=0))


def _name(setting: Setting) -> str:
    return "dense" if setting.tau is None else f"tau {setting.tau:.3g}"
