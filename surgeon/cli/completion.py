"""What can stand in place of an unfinished word, for the completion of a shell, which completes files itself.

Nothing here imports torch: a shell asks at every press of the tab key.
"""

from __future__ import annotations

import contextlib
import io
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping

import typer

Values = Iterator[tuple[str, str]]
"""Whole words that begin with the unfinished one, each with its help."""

VARIABLE = "_SURGEON_COMPLETE"
"""In the environment while a shell asks what can stand there."""

_HELP = 60  # characters

RULES = ("max", "cumulative", "energy", "top_k")
TARGETS = ("transformers", "openvino", "onnx")
LINEARS = ("float", "int8", "int8-weights", "int4-weights")
DTYPES = ("float32", "bfloat16", "float16")
MASKS = ("uniform", "skewed", "clustered")
DEVICES = ("cpu", "cuda")
GPUS = ("h100", "h200", "a100", "cuda", "list")


def one_of(names: Iterable[str]) -> Callable[[str], Values]:
    """Complete a word by these names."""
    kept = tuple(names)

    def complete(incomplete: str) -> Values:
        yield from _last("", incomplete, dict.fromkeys(kept, ""))

    return complete


def list_of(names: Iterable[str]) -> Callable[[str], Values]:
    """Complete the last word of a list separated by commas by these names."""
    kept = tuple(names)

    def complete(incomplete: str) -> Values:
        yield from _in_list(incomplete, dict.fromkeys(kept, ""))

    return complete


def passes(incomplete: str) -> Values:
    """Complete the last pass of a list separated by commas."""
    yield from _in_list(incomplete, _passes())


def one_pass(incomplete: str) -> Values:
    """Complete the name of a pass."""
    yield from _last("", incomplete, _passes())


def recipes(incomplete: str) -> Values:
    """Complete the name of a recipe. The shell completes files where no name begins so."""
    from surgeon.surgery.recipes import all_recipes

    yield from _last("", incomplete, all_recipes())


def schemas(context: typer.Context, incomplete: str) -> Values:
    """Complete the next word of the command whose schema is asked for."""
    from surgeon.json_values import schemas as files

    given = list(context.params.get("names") or ())
    commands = [name.split() for name in files()]
    rest = [words[len(given)] for words in commands if words[: len(given)] == given and len(words) > len(given)]
    yield from _last("", incomplete, dict.fromkeys(rest, ""))


def settings(context: typer.Context, incomplete: str) -> Values:
    """Complete `pass.option=value`, for the passes that --passes names, else for all."""
    from surgeon.passes.catalogue import all_about

    named = {name.strip() for name in (context.params.get("passes") or "").split(",")}
    known = all_about()
    chosen = {name: about for name, about in known.items() if name in named} or known
    left, equals, _ = incomplete.partition("=")
    name, _, key = left.partition(".")
    for about in chosen.values():
        for option in about.options:
            if not equals:
                yield from _last("", incomplete, {f"{about.name}.{option.name}=": option.help})
            elif (about.name, option.name) == (name, key.replace("-", "_")):
                yield from _last(f"{left}=", incomplete, dict.fromkeys(_choices(option.type), ""))


def _choices(kind: str) -> list[str]:
    """The values of a type in words that are listed there: `relu|silu or PATTERN:...,...` has relu and silu."""
    return kind.partition(" ")[0].split("|") if "|" in kind else []


def _passes() -> dict[str, str]:
    from surgeon.passes.catalogue import all_about

    return {name: about.summary for name, about in all_about().items()}


def _in_list(incomplete: str, known: Mapping[str, str]) -> Values:
    before, comma, _ = incomplete.rpartition(",")
    given = before.split(",")
    yield from _last(before + comma, incomplete, {name: help for name, help in known.items() if name not in given})


def _last(before: str, incomplete: str, known: Mapping[str, str]) -> Values:
    """The words that are `before` and a known name, and begin as the unfinished word does."""
    for name, help in known.items():
        if (before + name).startswith(incomplete):
            # Longer ones are wrapped on their way to the shell, which takes every line for a word.
            yield before + name, textwrap.shorten(help, _HELP, placeholder=" …")


# --- bash ---


def in_bash(run: Callable[[], None]) -> None:
    """Answer bash, for which a word ends at = and at :, so that it replaces what is behind the last of them alone.

    run: answers a shell that asks for whole words, and ends the process.
    """
    words, place, cut = rejoined(os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"]))
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(place)}
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            run()
    finally:
        typer.echo("\n".join(line[cut:] for line in answer.getvalue().splitlines()))


def rejoined(words: list[str], place: int) -> tuple[list[str], int, int]:
    """Join words that bash split at = and :.

    Returns:
        The words, the place of the unfinished one among them, and the number of characters in front of what bash takes
        for the unfinished word.
    """
    joined: list[str] = []
    at = cut = 0
    for number, word in enumerate([*words, ""] if place == len(words) else words):
        breaks = bool(word) and not word.strip("=:")
        if number and joined and (breaks or joined[-1].endswith(("=", ":"))):
            before, joined[-1] = len(joined[-1]), joined[-1] + word
        else:
            before = 0
            joined.append(word)
        if number == place:
            at, cut = len(joined) - 1, before + (len(word) if breaks else 0)
    return joined, at, cut


def asked_by_bash(environment: Mapping[str, str]) -> bool:
    """Whether bash asks what can stand in place of a word."""
    return environment.get(VARIABLE) == "complete_bash" and "COMP_WORDS" in environment
