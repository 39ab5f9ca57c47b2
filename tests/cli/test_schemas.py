"""Every answer in JSON has a schema in the package, and is what that says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from surgeon.jobs.answers import ANSWERS, json_schema
from surgeon.jobs.demo import DigitsViT
from surgeon.json_values import SCHEMAS, schema_name, schemas

from .harness import DATA, NET, Run, check_answer, run_surgeon
from .test_help import COMMANDS, GROUPS

REVIEWS = ("--data", "reviews.csv", "--eval-fraction", "0.5")
SMALL = ("--width", "16", "--hidden", "32", "--size", "8", "--tokens", "2", "--share", "0.5", "--seconds", "0.001")
# Of every command, each form of its answer.
LINES: dict[str, tuple[tuple[str, ...], ...]] = {
    "inspect": ((*NET, "--graph"), ("bert-moe",)),
    "passes": ((), ("moeify",), ("lower", "--example")),
    "explain": ((*NET, "--passes", "moeify"),),
    "apply": (
        (*NET, *DATA, "--passes", "moeify,lower", "--set", "moeify.experts=4", "--tau", "0.1", "-o", "made"),
        (*NET, "--passes", "moeify", "--dry-run"),
    ),
    "demo": (("made", "--quick"),),
    "diff": (("bert-moe",), ("masked", "bert-moe", "--full")),
    "recipe init": (("relufy", "-o", "relufy.yaml"), ("--from", "masked", "-o", "again.yaml")),
    "recipe check": (("mine.yaml",),),
    "recipe show": (("cmoe",), ("d2dmoe",), ("mine.yaml",), ("masked",)),
    "report": (("masked", "-o", "report.html"),),
    "plot": (("bert-moe", "experts", *REVIEWS, "-o", "p.png"),),
    "sweep": (("bert-moe", *REVIEWS, "--tau", "0.1"), ("masked", *DATA, "--tau", "0.1", "--each-layer")),
    "compare": (("bert-moe", *REVIEWS, "--tau", "0.1", "--dense", "bert"),),
    "load": (("bert-moe", *REVIEWS, "--map-text", "a good film"),),
    "tune": (("mine", *REVIEWS, "--budget", "0.95", "--samples", "8"),),
    "set": (("mine", "--tau", "0.05"),),
    "export": (("bert-moe", "-o", "hf"),),
    "bench layer": ((*SMALL, "--dtype", "float32", "--methods", "dense,ours"),),
    "bench linear": (("--d-in", "16", "--d-out", "16", "--dtype", "float32", "--share", "0.5", "--seconds", "0.001"),),
    "bench predict": (("list",), ("h100", "--tokens", "8")),
    "doctor": ((),),
    "schema": ((),),
}
# Their own tests read their answers: they take long, or need more than this shelf has.
ELSEWHERE = {"compile", "generate", "bench surgery", "error"}


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is trained in a second."""
    small = partial(DigitsViT, dim=8, depth=1, heads=1, hidden=32)
    monkeypatch.setattr("surgeon.jobs.demo.DigitsViT", small)


@pytest.mark.parametrize("command", sorted(ANSWERS))
def test_the_package_has_the_schema_of_every_answer(command: str, request: pytest.FixtureRequest) -> None:
    file = SCHEMAS / f"{command.replace(' ', '-')}.json"
    text = json.dumps(json_schema(command), indent=1, ensure_ascii=False) + "\n"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text, "run pytest --update-golden; if a field is gone, raise its version"
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_every_command_has_a_schema_and_a_test() -> None:
    assert set(ANSWERS) == {name for name in COMMANDS if name not in GROUPS} | {"error"} == set(schemas())
    assert LINES.keys() | ELSEWHERE == set(ANSWERS)


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
@pytest.mark.usefixtures("small_machine", "small_demo")
def test_every_answer_is_what_its_schema_says(run: Run, tmp_path: Path, command: str, line: tuple[str, ...]) -> None:
    if "mine" in line:
        shutil.copytree((tmp_path / "bert-moe").resolve(), tmp_path / "mine")
    if "mine.yaml" in line:
        (tmp_path / "mine.yaml").write_text("passes:\n- moeify:\n    experts: {'*.0.*': 8, '*': 4}\n- lower\n")
    result = run("-q", "--output", "json", *command.split(), *line)
    assert result.code == 0, result.err
    assert json.loads(result.out)["schema"] == schema_name(command)
    assert result.json  # which is checked


@pytest.mark.parametrize("line", [("inspect", "nothing"), ("inspect",), ("bench", "predict", "h1000")])
def test_errors_are_what_their_schema_says(run: Run, line: tuple[str, ...]) -> None:
    result = run(*line, "--output", "json")
    assert json.loads(result.out)["schema"] == schema_name("error")
    assert result.json["error"]["message"] in result.err


def test_a_file_has_the_answer(run: Run, tmp_path: Path) -> None:
    result = run("-q", "bench", "predict", "h100", "--tokens", "8", "-o", "times.json", "--output", "json")
    assert json.loads((tmp_path / "times.json").read_text()) == json.loads(result.out)


def test_numbers_are_as_they_were_typed(run: Run, tmp_path: Path) -> None:
    shutil.copytree((tmp_path / "bert-moe").resolve(), tmp_path / "mine")
    layers = run("-q", "set", "mine", "--tau", "0.05", "--output", "json").json["layers"]
    assert [change["after"]["tau"] for change in layers.values()] == [0.05, 0.05]
    experts = run("-q", "inspect", "mine", "--output", "json").json["experts"]
    assert [layer["tau"] for layer in experts] == [0.05, 0.05]


def test_a_schema_can_be_printed() -> None:
    printed = run_surgeon("schema", "bench", "layer")
    assert printed.out == run_surgeon("schema", "bench", "layer", "--output", "json").out
    assert json.loads(printed.out)["$id"] == schema_name("bench layer") == "surgeon.bench-layer.v1"
    refused = run_surgeon("schema", "bench")
    assert (refused.code, refused.out) == (2, "")
    assert "There is no schema 'bench'. There are: apply, bench layer" in refused.err


@pytest.mark.parametrize(("change", "words"), [
    (lambda answer: answer.pop("checks"), "'checks' is a required property"),
    (lambda answer: answer.update(more=1), "'more' was unexpected"),
    (lambda answer: answer["checks"][0].update(state="fine"), "'fine' is not one of"),
])  # fmt: skip
def test_what_a_schema_refuses(change: Callable[[Any], None], words: str) -> None:
    answer = {"schema": schema_name("doctor"), "checks": [{"name": "a", "state": "ok", "found": "", "advice": ""}]}
    check_answer(answer)
    change(answer)
    with pytest.raises(jsonschema.ValidationError, match=words):
        check_answer(answer)
