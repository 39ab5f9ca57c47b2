"""Read YAML with the line of every value, so that messages can point to it.

Anchors and aliases are refused: a pattern that begins with * and lacks its quotes is one to YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

Place = tuple[str | int, ...]
"""Keys and positions that lead to a value: `("passes", 1, "moeify", "experts")`."""


@dataclass(frozen=True)
class Problem:
    """What is wrong in a file, and on which line, counted from 1."""

    line: int
    message: str


@dataclass
class Document:
    """The values of a YAML file, the line of each, and what is wrong with it as YAML."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Return the line of the value at a place, or else of the nearest value around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_document(text: str) -> Document:
    """Read YAML. A text that is no YAML gives a document whose problems say where and why."""
    found = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            found.value = _read(node, (), loader, found)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = " ".join(part for part in (error.problem, error.context) if part)
        if error.context == "while scanning an alias":
            why = "a text that begins with * needs quotes, such as '*.0'"
        found.problems.append(Problem(1 if mark is None else mark.line + 1, f"this is no YAML: {why}."))
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        found.problems.append(Problem(line, f"this is no YAML: it has the character {error.character:#06x}."))
    except RecursionError:
        found.problems.append(Problem(1, "this is no YAML: it is nested too deeply."))
    return found


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Makes plain values only, and no value twice."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, "a text that begins with * needs quotes", event.start_mark)
        return super().compose_node(parent, index)


def _read(node: Node, place: Place, loader: _Loader, found: Document) -> Any:
    found.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        return [_read(part, (*place, index), loader, found) for index, part in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        try:
            return loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):  # of a date such as 2026-13-01, or a tag that does not fit
            raise yaml.MarkedYAMLError(None, None, f"'{node.value}' has no value", node.start_mark) from None
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in values:
            found.problems.append(Problem(line, f"{key} stands here twice."))
        found.lines.setdefault((*place, key), line)
        values[key] = _read(value_node, (*place, key), loader, found)
    return values
