"""What wrong command lines are told, all of it: tests/golden/cli/messages.txt.

`pytest --update-golden` writes the file anew. Read what it says: each message has to blame what is wrong, and to say
what to type.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from surgeon.cli.options import TaskName
from surgeon.errors import UsageError
from surgeon.models.tasks import TASKS

from .harness import Run

LINES = """
aply bert
apply
apply bert
apply bert --passes moefy
apply bert --passes moeify --sets moeify.experts=3
apply bert --passes moeify --set experts=3
apply bert --passes moeify --set moeify.expert=3
apply bert --passes moeify --set moeify.experts=two
apply bert --passes moeify --set moeify.only=decoder
apply bert --passes mlpify
apply bert --passes lower
apply bert --passes moeify,sparsify
apply bert --passes moeify --tau 0.1
apply bert --passes moeify --resume
apply bert --passes moeify --label stars
apply bert --passes moeify --data reviews.csv --label stars
apply bert --passes moeify --data reviews.csv --text body
apply bert --passes moeify --data nothing.csv
apply bert --passes moeify --data reviews.csv --batch-size 0
apply bert --passes moeify --data reviews.csv --eval-fraction 1
apply bert --passes moeify --data reviews.csv --task poetry
apply bert --passes moeify --data reviews.csv --task question-answering --text text
apply bert --passes moeify --data reviews.csv --report-to nothing
apply bert --passes moeify --teacher bert
apply bert --passes moeify --recipe recommended
apply bert --recipe recommend
apply bert --recipe d2dmoe --dry-run --budget-minutes 3
apply bert --passes moeify -o masked
apply bert --passes moeify -o bert
apply bert-moe --passes moeify
apply bert-moe --passes swap-activation
apply bert-moe --passes lower
apply masked --passes lower --set lower.only=x
apply nets:linear --inputs nets:inputs --passes moeify
inspect moeify
inspect nowhere
inspect bert/config.json
inspect bert/model.safetensors
inspect bert/model.safetensors --arch brt
inspect bert/tokenizer.json
inspect bert-moe/model.pt2 --inputs nothing
inspect nets:gelu
inspect nets:nothing --inputs nets:inputs
inspect nets:branches --inputs nets:inputs
inspect bert --output xml
explain bert --passes moeify --at decoder
diff bert
diff bert-moe --stat --full
sweep bert-moe
sweep bert --data reviews.csv
sweep bert-moe --data reviews.csv --tau 2
sweep bert-moe --data reviews.csv -o sweep.txt
load bert-moe
load bert-moe --map-image nothing.png
plot bert-moe pie --data reviews.csv
plot bert-moe pareto -o pareto.png
plot bert-moe ablation -o ablation.png
set bert-moe --tau 2
set bert-moe --tau decoder:0.1
set bert-moe --rule least
set bert-moe --compensate
tune bert-moe --budget 40 --data reviews.csv
tune bert-moe --budget 0.4 --metric ms --data reviews.csv
compare bert-moe bert-moe --data reviews.csv
export bert-moe --to tflite
export bert-moe --cache
generate bert-moe hello
compile bert
report bert -o report.html
passes moefy
bench layer --activation step
bench layer --device tpu
bench surgery bert
bench predict h1000
"""


def test_every_wrong_line_is_told_what_to_type(run: Run, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    told = []
    for line in LINES.strip().splitlines():
        result = run("-q", *shlex.split(line))
        assert result.code in (1, 2, 3), line
        words = result.err.replace(str(tmp_path), "HERE")
        # What torch says about a model that it cannot trace is torch's.
        told.append(f"$ surgeon {line}\n{re.sub(r'(?ms)^  - .*', '  - ...', words).rstrip()}")
    golden("cli/messages", "\n\n".join(told))


def test_every_message_is_a_whole_sentence(golden: Callable[[str, str], None]) -> None:
    text = (Path(__file__).parents[1] / "golden" / "cli" / "messages.txt").read_text(encoding="utf-8")
    assert not re.search(r"[?!]\.(\s|$)|\w\.\.(\s|$)|  (?!-)|\bNone\b", text)
    assert all(one.startswith("error: ") for block in text.split("\n\n") for one in block.splitlines()[1:2])


def test_every_task_can_be_typed() -> None:
    assert set(TaskName.__args__) == set(TASKS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", ["--task", "--output", "--verify"])
def test_values_to_choose_from_are_named(run: Run, option: str) -> None:
    assert "is not one of" in run("apply", "bert", "--passes", "moeify", option, "x").err


@pytest.mark.parametrize(("words", "level"), [((), logging.ERROR), (("--debug",), logging.NOTSET)])
def test_what_other_packages_log_when_they_are_imported_is_not_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], level: int
) -> None:
    found: list[int] = []

    def show(name: str) -> None:
        found.append(logging.getLogger("torchao").level)
        raise UsageError("enough")

    monkeypatch.setattr("surgeon.jobs.recipe.show_recipe", show)
    monkeypatch.setattr(logging.getLogger("torchao"), "level", logging.NOTSET)
    assert run("recipe", "show", "x", *words).code == 2
    assert found == [level]
