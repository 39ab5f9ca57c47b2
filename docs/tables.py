"""Tables of the site that are made from the code: every command with its options, and every option of every pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from surgeon.cli import app

ROOT = Path(__file__).parents[1]


def commands() -> str:
    """Every command with its options, as `--help` has them."""
    return "\n".join(line for name, command in _walk(typer.main.get_command(app)) for line in _command(name, command))


def _walk(command: Any, name: str = "surgeon") -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for one in command.list_commands(None):
        yield from _walk(command.commands[one], f"{name} {one}")


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}\n"
    for paragraph in command.help.split("\n\n"):
        head, _, rest = " ".join(paragraph.split()).partition(": ")
        if head == "Example":
            yield f"```\n{rest}\n```\n"
        elif head == "JSON":
            yield f"With `--output json`: `{rest}`\n"
        else:
            yield f"{_text(' '.join(paragraph.split()))}\n"
    yield "| | default | |\n| --- | --- | --- |"
    for one in command.params:
        if not one.hidden:
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            argument = type(one).__name__ == "TyperArgument"
            shown = f"`{one.metavar or one.name.upper()}`" if argument else names
            value = f" `{one.metavar}`" if one.metavar and not argument else ""
            default = "required" if one.required else _default(one.default)
            yield f"| {shown}{value} | {default} | {_text(one.help)} |"
    yield ""


def options() -> str:
    """Every option of every pass, as `surgeon passes NAME` has them."""
    lines = []
    for one in json.loads((ROOT / "passes" / "catalogue.json").read_text(encoding="utf-8"))["passes"]:
        lines += [f"## {one['name']}\n", *(f"{_text(part)}\n" for part in one["description"].split("\n\n"))]
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        for option in one["options"]:
            takes = option["type"].replace("|", ", ")
            lines.append(f"| `{option['name']}` | {takes} | {_default(option['default'])} | {_text(option['help'])} |")
        lines.append("")
    return "\n".join(lines)


def _default(value: Any) -> str:
    if value is None or value in ((), [], ""):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{getattr(value, 'value', value)}`"


def _text(text: str | None) -> str:
    """Plain text as Markdown that shows it as it is."""
    return re.sub(r"([|*_<>\[\]$])", r"\\\1", " ".join((text or "").split()))
