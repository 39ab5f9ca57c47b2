"""Tables of the site that are made from the code: every command with its options, and every option of every pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from surgeon.cli import app

ROOT = Path(__file__).parents[1]


def commands() -> str:
    """Every command with its options, as `--help` has them. Those that all commands have come once, at the top."""
    found = list(_walk(typer.main.get_command(app)))
    shared = set.intersection(*({one.name for one in command.params} for _, command in found))
    lines = ["Every command has these options:\n"]
    lines += _table(one for one in found[0][1].params if one.name in shared)
    for name, command in found:
        lines += [f"## {name}\n", *_help(command.help)]
        lines += _table(one for one in command.params if one.name not in shared and not one.hidden)
    return "\n".join(lines)


def _walk(command: Any, name: str = "surgeon") -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for one in command.list_commands(None):
        yield from _walk(command.commands[one], f"{name} {one}")


def _help(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        head, _, rest = line.partition(": ")
        if head == "Example":
            yield f"```\n{rest}\n```\n"
        elif head == "JSON":
            yield f"With `--output json`: `{rest}`\n"
        else:
            yield f"{_text(line)}\n"


def _table(params: Iterable[Any]) -> list[str]:
    rows = [_row(one) for one in params]
    return ["| | default | |", "| --- | --- | --- |", *rows, ""] if rows else []


def _row(one: Any) -> str:
    if type(one).__name__ == "TyperArgument":
        shown = f"`{one.metavar or one.name.upper()}`"
    else:
        value = f" {one.metavar}" if one.metavar else ""
        shown = ", ".join(f"`{name}{value}`" for name in (*one.opts, *one.secondary_opts))
    return f"| {shown} | {'required' if one.required else _default(one.default)} | {_text(one.help)} |"


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
