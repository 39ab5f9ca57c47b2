"""The examples of the README and of the pages under docs run as they stand, and tables of fields name what there is.

The pages speak of models and data that a reader has. Small ones of the same kind stand in for them here: `place` says
which. `sphinx-build`, which CI runs too, checks links and names.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

import surgeon
from surgeon.cli import app
from surgeon.surgery.record import Record
from tests.cli.shelf import write_bert

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(python|console)(?: file=(\S+))?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str | None, str]]:
    """Language, file to be saved as, and text of every block that is to run, on the lines that it has in the page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield match[1], match[2], "\n" * text.count("\n", 0, match.start(3)) + match[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page.

    It has `bert-dir`, a Hugging Face model with a tokenizer, and `reviews.csv` for it. For the tutorial it has
    `minilm`, a small BERT with random weights in the place of the pretrained MiniLM, and `reviews` with a few rows in
    the place of ten thousand.
    """
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path)
    (tmp_path / "bert").rename("bert-dir")
    config = BertConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=256, num_attention_heads=4, vocab_size=40
    )
    BertForSequenceClassification(config).save_pretrained("bert-dir")
    AutoTokenizer.from_pretrained("bert-dir").save_pretrained("minilm")
    BertModel(config).save_pretrained("minilm")
    with Path("reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = [{"text": row["text"], "label": int(row["label"])} for row in csv.DictReader(file)]
    Path("reviews").mkdir()
    for name, part in (("train", rows[:32]), ("test", rows[32:])):
        Path(f"reviews/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run_in_order(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module, since classes that a page defines look up their types in it.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.syspath_prepend(place)
    # Not by monkeypatch, which takes the value away in the end: the config has none of its own in its `__dict__`.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        for language, file, block in blocks(page):
            if file is not None:
                Path(file).write_text(block, encoding="utf-8")
            elif language == "python":
                exec(compile(block, str(page), "exec"), module.__dict__)
            else:
                for command in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE):
                    run(command)


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "surgeon"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (command, done.output)
    assert done.stdout


def test_every_field_of_a_record_is_explained() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    table = page[page.index("| field | content |") : page.index("The record is a [recipe]")]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {field.name for field in dataclasses.fields(Record)}


def test_the_readme_shows_both_ways() -> None:
    assert {language for language, _, _ in blocks(PAGES[0])} == {"python", "console"}
    assert len(PAGES) > 1


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert [name for name in surgeon.__all__ if not re.search(rf"surgeon\.{name}\b", text)] == []
