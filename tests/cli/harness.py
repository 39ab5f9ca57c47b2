"""Run the command line inside the test, and name the model and data that most runs take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
from typer.testing import CliRunner

from surgeon.cli import app
from surgeon.json_values import schema_name, schemas
from surgeon.surgery.record import RECORD

NET = ("nets:gelu", "--inputs", "nets:inputs")
DATA = ("--data", "nets:data", "--task", "classification")


class Result:
    """What one run of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return answer_in(self.out)


Run = Callable[..., Result]


def strict(schema: Any) -> Any:
    """A schema that allows no fields but those it names. Users' schemas allow more, since fields may be added."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    return closed | ({"additionalProperties": False} if "properties" in schema else {})


def answer_in(text: str) -> Any:
    """An answer in JSON without the name of its schema, which it is checked against."""
    answer = json.loads(text)
    check_answer(answer)
    return {name: value for name, value in answer.items() if name != "schema"}


def check_answer(answer: Any) -> None:
    """Check an answer against the schema in the package that it names, without any field that this does not name."""
    (file,) = (file for command, file in schemas().items() if schema_name(command) == answer["schema"])
    schema = strict(json.loads(file.read_text(encoding="utf-8")))
    jsonschema.validate(answer, schema, cls=jsonschema.Draft202012Validator)


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
