"""What the command line says about itself: help, version, and where options may stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import surgeon.cli
from surgeon.cli import app
from surgeon.passes.registry import all_passes

from .harness import run_surgeon


def commands(group: Any, path: str = "") -> Iterator[str]:
    """Every command as it is typed, a group before what is in it, in the order of the help."""
    for name in group.list_commands(None):
        yield f"{path}{name}"
        if isinstance(group.commands[name], TyperGroup):
            yield from commands(group.commands[name], f"{path}{name} ")


COMMANDS = tuple(commands(get_command(app)))
GROUPS = ("bench", "recipe")
GREET = '''
from surgeon.cli.app import Run, command

@command(order=55)
def greet(run: Run, name: str) -> None:
    """Greet."""
    run.screen.result({"hello": name})
'''


def test_help_lists_the_commands_without_loading_torch() -> None:
    code = (
        "import sys; from surgeon.cli import app\n"
        "try: app(['--help'], prog_name='surgeon')\n"
        "finally: print({name for name in ('torch', 'rich.table', 'transformers', 'pydantic') if name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("set()")
    assert re.findall(r"^  (\w+) ", done.stdout.partition("Commands:\n")[2], re.MULTILINE)[:-2] == [
        name for name in COMMANDS if " " not in name
    ]
    assert "Exit codes: 0 done" in done.stdout


def test_commands_are_listed_in_the_order_of_a_first_use() -> None:
    first_use = [
        "demo",
        "inspect",
        "apply",
        "sweep",
        "bench",
        "bench layer",
        "bench surgery",
        "bench predict",
        "doctor",
    ]
    assert [name for name in COMMANDS if name in first_use] == first_use


def test_a_module_is_all_that_a_command_needs(tmp_path: Path) -> None:
    shutil.copytree(Path(surgeon.cli.__file__).parent, tmp_path / "cli")
    (tmp_path / "cli" / "greet.py").write_text(GREET)
    code = (
        f"import sys, surgeon; surgeon.__path__.insert(0, {str(tmp_path)!r})\n"
        "from surgeon.cli import app\n"
        "app(sys.argv[1:], prog_name='surgeon')"
    )
    for args, words in (
        (("greet", "you"), r'^{\n "hello": "you"\n}\n$'),
        (("--help",), r"  apply .*\n  greet +Greet\.\n  diff "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *args, "--output", "json"], capture_output=True, text=True, check=False
        )
        assert re.search(words, done.stdout), done.stdout + done.stderr


def test_a_group_shows_its_help_and_takes_the_options_of_all() -> None:
    for name in GROUPS:
        result = run_surgeon(name)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(f"Usage: surgeon {name} [OPTIONS] COMMAND")
    for args in (("--output", "json", "bench"), ("bench", "--output", "json")):
        assert run_surgeon(*args, "predict", "list").json["devices"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run_surgeon(*name.split(), "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert f"Example: surgeon {name}" in text
    assert f"JSON: surgeon schema {name}" in text
    assert all(option in text for option in ("--output <rich|plain|json>", "--verbose", "--quiet", "--debug"))


def test_no_arguments_show_the_help() -> None:
    result = run_surgeon()
    assert result.code == 0
    assert result.out.startswith("Usage: surgeon")


def test_version_and_module_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "surgeon", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"surgeon \d+\.\d+\.\d+\n", done.stdout)
    assert run_surgeon("--version").out == done.stdout


@pytest.mark.parametrize("before", [True, False])
def test_output_can_stand_before_and_after_the_command(before: bool) -> None:
    option = ("--output", "json")
    result = run_surgeon(*option, "passes") if before else run_surgeon("passes", *option)
    assert [one["name"] for one in result.json["passes"]] == list(all_passes())
