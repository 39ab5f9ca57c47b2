"""Messages name options in the words of those who read them: Python's arguments or the flags of the command line.

The folders below `jobs` are called from Python. Their messages name flags only where the command line alone shows them:
in `command=` of an error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgeon.errors import SaveError, UsageError, sentence, tidy

from .test_layers import folder, modules

COMMANDS = ("cli", "jobs", "render")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Of arguments in Python that are options of commands too.
ARGUMENT = re.compile(
    r"\b(data|inputs|overwrite|resume|dry_run|label|text|task|tau|dense|arch|trust_pickle|trust_modules|batch_size"
    r"|max_length|eval_fraction)=(?!\{)"
)
# Flags of other programs.
THEIRS = {"--local-dir", "--use_fsdp", "--use_deepspeed", "--version", "--no-undefined"}


def texts(tree: ast.AST, *, skipped: str = "") -> Iterator[tuple[int, str]]:
    """Every text in some code with its line, but docstrings and what an argument or a key of this name holds."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg == skipped:
            continue
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            kept = [value for key, value in pairs if not (isinstance(key, ast.Constant) and key.value == skipped)]
            yield from texts(ast.Tuple(kept), skipped=skipped)
        elif isinstance(node, ast.Assign) and any(getattr(target, "attr", "") == skipped for target in node.targets):
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            yield from texts(node, skipped=skipped)


def flags(code: str) -> list[str]:
    """The flags of commands in the texts that Python shows."""
    found = [flag for _, text in texts(ast.parse(code), skipped="command") for flag in FLAG.findall(text)]
    return [flag for flag in found if flag not in THEIRS]


def files(*, of_commands: bool) -> list[Path]:
    return [
        file
        for name, file in modules().items()
        if name.count(".") and (folder(name) in COMMANDS) == of_commands and name != "surgeon.__main__"
    ]


def test_messages_in_python_name_no_flags() -> None:
    found = {str(file): flags(file.read_text(encoding="utf-8")) for file in files(of_commands=False)}
    assert {file: some for file, some in found.items() if some} == {}


def test_messages_of_commands_name_no_arguments_of_python() -> None:
    wrong = []
    for file in files(of_commands=True):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                wrong += [f"{file}:{line}: {text}" for line, text in texts(node.exc) if ARGUMENT.search(text)]
    assert wrong == []


@pytest.mark.parametrize(("code", "found"), [
    ("raise UsageError('Give --data.')", ["--data"]),
    ("raise UsageError('x', python='Give data=.', command='Give --data.')", []),
    ("raise UsageError(f'{x} needs data: {y}. Run with --data', python='--resume')", ["--data", "--resume"]),
    ("HELP = {'python': 'a', 'command': '--a'}", []),
    ("def f():\n    'as `surgeon --help`'\n    return 'a -- b'", []),
    ("subprocess.run(['c++', '--version'])", []),
])  # fmt: skip
def test_what_is_looked_for(code: str, found: list[str]) -> None:
    assert flags(code) == found


def test_an_error_has_the_words_of_python_and_those_of_commands() -> None:
    error = UsageError("moeify needs data.", python="Give data=.", command="Give --data.")
    assert (str(error), error.in_command) == ("moeify needs data. Give data=.", "moeify needs data. Give --data.")
    assert error.what == "moeify needs data."
    plain = SaveError("No space.")
    assert str(plain) == plain.in_command == plain.what == "No space."


@pytest.mark.parametrize(("text", "tidied"), [
    ("Did you mean 'apply'?. See surgeon --help.", "Did you mean 'apply'? See surgeon --help."),
    ("It cannot be read: no such file.. Give another.", "It cannot be read: no such file. Give another."),
    ("Attempts: ...", "Attempts: ..."),
    ("Give ../a or 1..2", "Give ../a or 1..2"),
])  # fmt: skip
def test_sentences_end_once(text: str, tidied: str) -> None:
    assert tidy(text) == str(UsageError(text)) == tidied
    assert sentence("Did you mean 'a'?") == "Did you mean 'a'?"
    assert sentence("Missing option") == "Missing option."
