"""What the command line says about itself: help, version, and where options may stand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from surgeon.passes.registry import all_passes

from .harness import run_surgeon

COMMANDS = ("demo", "inspect", "passes", "explain", "apply", "diff", "sweep", "tune", "set", "bench", "doctor")


def test_help_lists_the_commands_without_loading_torch() -> None:
    code = (
        "import sys; from surgeon.cli import app\n"
        "try: app(['--help'], prog_name='surgeon')\n"
        "finally: print({name for name in ('torch', 'rich.table', 'transformers', 'pydantic') if name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("set()")
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert "Exit codes: 0 done" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run_surgeon(name, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert f"Example: surgeon {name}" in text
    assert "JSON: {" in text
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
