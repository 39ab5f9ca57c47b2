"""Every error a user can meet, each with the exit code the command line returns for it.

An error says what, where, why, and what to try. What to try differs between Python and the command line: an error that
both can meet has it in the words of each. `SurgeonError` is never raised itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without a full stop, or its class name if it has no message.

    A line that ends in a colon only announces the next one, which is added. The message of a `KeyError` and the like is
    only a value or a fragment, so the name of the class stands before it.
    """
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1]).rstrip(".")
    if isinstance(error, LookupError | AttributeError | TypeError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def some(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names of a list, and say how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def tidy(text: str) -> str:
    """Drop the full stop behind another end of a sentence. Texts are put together, so both may have brought one."""
    return re.sub(r"([?!])\.(?=\s|$)|(?<=[\w)'\"\]])\.\.(?=\s|$)", lambda twice: twice[1] or ".", text.strip())


def sentence(text: str) -> str:
    """End a text as a sentence ends."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


class SurgeonError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns.

    text: what is wrong, and what to try if that is the same everywhere. python, command: what to try, in the words of a
    Python call and in those of a command line, where Python's are the default. `str` has Python's, `in_command` the
    others, `what` neither.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, text: object = "", *, python: str = "", command: str = "") -> None:
        self.what = tidy(str(text))
        self.in_command = tidy(f"{text} {command or python}")
        super().__init__(tidy(f"{text} {python}"))


class NothingChangedError(SurgeonError):
    """A gate was not met: a pass changed nothing, or quality fell below the limit the user set."""

    exit_code = 1


class UsageError(SurgeonError, ValueError):
    """An option or an argument is wrong: an unknown pass, a bad number of experts, passes in the wrong order."""

    exit_code = 2


class DataError(UsageError):
    """The data given cannot be read or does not have what the task needs (a missing column, no labels, ...)."""


class SizeError(UsageError):
    """An input of a graph has a size at which the graph is not known to compute what its model computes."""


class LoadError(SurgeonError):
    """A model or an artifact cannot be loaded: not a model, pickled code, damaged or truncated files."""

    exit_code = 3


class TraceError(SurgeonError):
    """A model cannot be traced into a graph, or its graph does not compute what the model computes."""

    exit_code = 3


class PassError(SurgeonError):
    """A pass failed and left the graph as it was. The message names the pass and the site."""


class DivergedError(PassError):
    """The loss of a training is not finite."""


class VerificationError(PassError):
    """A pass changed what it claims to preserve. The message names the pass, the site and the difference."""


class SaveError(SurgeonError):
    """The result cannot be written (no space, no permission, the target exists). Nothing half-written is left."""
