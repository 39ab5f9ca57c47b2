"""Run the command line inside the test, and name the model and data that most runs take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from surgeon.cli import app
from surgeon.surgery.record import RECORD

NET = ("nets:gelu", "--inputs", "nets:inputs")
DATA = ("--data", "nets:data", "--task", "classification")


class Result:
    """What one run of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def run_surgeon(*args: str) -> Result:
    result = CliRunner().invoke(app, args, prog_name="surgeon")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output or "--debug" in args
    assert "\x1b" not in result.output
    return Result(result.exit_code, result.stdout, result.stderr)


def recorded(directory: Path) -> Any:
    """The content of `surgery.json` in a directory."""
    return json.loads((directory / RECORD).read_text(encoding="utf-8"))


def left(place: Path) -> set[str]:
    """What is in a directory beside the links to the shelf, hidden files included."""
    return {path.name for path in place.iterdir() if not path.is_symlink()}
