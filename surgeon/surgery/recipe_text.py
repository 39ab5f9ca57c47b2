"""Write a recipe as a YAML file that explains itself: a comment for every pass and every option."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from surgeon.passes.about import Option, describe
from surgeon.passes.base import Pass

_WIDTH = 100


def recipe_text(
    passes: Iterable[tuple[str, Mapping[str, Any], type[Pass[Any]] | None]],
    keys: Mapping[str, Any],
    *,
    about: Iterable[str] = (),
    complete: bool = False,
) -> str:
    """Return the text of a recipe file.

    Args:
        passes: name, options and class of each. Without a class, as for a pass of one's own, its options have no
            comments, and those that have their default are left out.
        keys: what else stands in the file, such as the seed.
        about: sentences for people, which stand at the top.
        complete: write all options, also those that have their default.
    """
    lines: list[str] = []
    for part in about:
        lines += [*(["#"] if lines else []), *_comment(part)]
    lines += [""] if lines else []
    lines += [_yaml({key: value}) for key, value in keys.items() if value is not None]
    lines += ["passes:"]
    for name, options, kind in passes:
        known = () if kind is None else describe(kind).options
        lines += [] if kind is None else _comment(_sentence(describe(kind).summary), 2)
        lines += _pass(name, options, known, complete)
    return "\n".join(lines) + "\n"


def _pass(name: str, options: Mapping[str, Any], known: Iterable[Option], complete: bool) -> list[str]:
    help = {option.name: option.help for option in known}
    defaults = {option.name: option.default for option in known} if complete else {}
    values = {**defaults, **options}
    if not values:
        return [f"  - {_scalar(name)}"]
    lines = [f"  - {_scalar(name)}:"]
    for key, value in values.items():
        lines += _comment(_sentence(help[key]), 6) if key in help else []
        lines.append(textwrap.indent(_yaml({key: list(value) if isinstance(value, tuple) else value}), " " * 6))
    return lines


def _sentence(text: str) -> str:
    """The first sentence of a text."""
    return text.partition(". ")[0].rstrip(".") + "."


def _comment(text: str, indent: int = 0) -> list[str]:
    """The text as lines of a comment."""
    start = " " * indent + "# "
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _yaml(value: Any) -> str:
    """A mapping as YAML: what is nested on lines of its own, lists of texts in one line."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)).rstrip("\n")


def _scalar(text: str) -> str:
    return _yaml({text: 0}).rpartition(":")[0]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes lists in one line."""

    def represent_list(self, data: Any) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
