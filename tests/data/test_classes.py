"""Labels: the class number of each, the same for every kind of file, and what would be a guess and is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf
from PIL import Image

from surgeon.data.classes import Classes
from surgeon.data.files import load_data
from surgeon.errors import DataError

from .tables import write_lines


def model(names: int | list[str]) -> Any:
    """The config of a model with this many classes, or with classes of these names."""
    if isinstance(names, int):
        return hf.BertConfig(num_labels=names)
    return hf.BertConfig(id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)})


def numbers(labels: list[Any], config: Any, *more: list[Any]) -> list[int]:
    """The class numbers of the first split."""
    splits = [datasets.Dataset.from_dict({"label": part}) for part in (labels, *more)]
    return Classes("a.jsonl", "label", splits, config).labels(splits[0])


DIGITS = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("labels", "config", "expected"),
    [
        (DIGITS, model(12), list(range(12))),
        (["0", "3"], model(5), [0, 3]),
        (["1.0", "03", " 2"], model(5), [1, 3, 2]),
        ([1.0, 2.0], model(3), [1, 2]),
        ([True, False], model(2), [1, 0]),
        (["True"], model(2), [1]),
        (["b", "a", "c", "a"], model(3), [1, 0, 2, 0]),
        (["LABEL_2", "LABEL_0"], model(3), [2, 0]),
        (["x", "y"], model(["z", "y", "x"]), [2, 1]),
        (["5", "1"], model(["1", "2", "3", "4", "5"]), [4, 0]),
        (["1", "0"], model(["bad", "good"]), [1, 0]),
        (["NA", "None", "null"], model(["None", "NA", "null"]), [1, 0, 2]),
        (["10", "2"], None, [10, 2]),
    ],
)
def test_numbers_of_labels(labels: list[Any], config: Any, expected: list[int]) -> None:
    assert numbers(labels, config) == expected


def test_names_are_numbered_over_all_splits() -> None:
    assert numbers(["c", "b"], model(3), ["a"]) == [2, 1]
    assert numbers(["10", "2"], model(11), [0, 1]) == [10, 2]
    assert numbers([0, 1], model(11), ["10", "2"]) == [0, 1]


def test_names_in_one_of_the_models_tables_suffice() -> None:
    config = model(["b", "a"])
    config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
    assert numbers(["a", "b"], config) == [1, 0]
    config.label2id = {"a": 1}
    assert numbers(["b", "a"], config) == [0, 1]
    config.label2id = {"a": 0, "b": 1}
    with pytest.raises(DataError, match=r"id2label and label2id .* give the class 'b' different numbers"):
        numbers(["a", "b"], config)
    config.label2id = {"a": "first"}
    with pytest.raises(DataError, match="a class of the model has no number, in id2label or label2id"):
        numbers(["a", "b"], config)


@pytest.mark.parametrize(
    ("labels", "config", "message"),
    [
        ([0, 3], model(3), r"row 1: label 3 is class 3, out of range: 0 to 2. Classes are counted from 0"),
        (["1", "2", "3"], model(3), r"row 2: label '3' is class 3, out of range: 0 to 2. Classes are counted from 0"),
        ([0, -1], model(3), r"row 1: label -1 is class -1, out of range"),
        (["0", "-1"], model(3), r"row 1: label '-1' is class -1, out of range"),
        ([0.0, 0.5], model(3), r"row 1: label 0.5 is not a class. Regression is not supported"),
        (["0", "0.5"], model(3), r"label '0.5' is not a class. Regression is not supported"),
        ([0.0, math.nan], model(3), r"row 1: label nan is not finite"),
        ([0, None], model(3), r"row 1: label None: the row has no label"),
        (["a", " ", "b", "c"], model(3), r"row 1: label ' ': the row has no label"),
        ([[0], [1]], model(3), r"row 0: label \[0\] is a list, not a class"),
        (["a", "b"], model(3), r"has 2 class names \('a', 'b'\), but the model has 3 classes without names"),
        (["1", "01"], model(3), r"the labels '01' and '1' are one number"),
        (["1", "2", "other"], model(3), r"some labels are numbers \('1', '2'\) and some are names \('other'\)"),
        (["x", "w"], model(["z", "y", "x"]), r"the model has no class 'w'. It has 'z', 'y', 'x'\."),
        (["1", "0"], model(["1", "2"]), r"the model has no class '0'. It has '1', '2'\."),
        (
            [1, 2],
            model(["1", "2"]),
            r"can mean class number 1 or the model's class named '1', which is number 0",
        ),
    ],
)
def test_labels_that_are_refused(labels: list[Any], config: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbers(labels, config)


def test_numbers_among_names_of_another_split() -> None:
    with pytest.raises(DataError, match="row 0: label 0 is not a class name, unlike the labels of other rows"):
        numbers([0], model(["x", "y"]), ["x", "y"])


def test_declared_order_of_a_dataset() -> None:
    names = ["1", "2", "3", "b", "a"]

    def declared(values: list[int], names: list[str]) -> Any:
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"label": values}, features=features)

    rows = declared([4, 0, -1], names)
    assert Classes("a", "label", [rows], model(5)).labels(rows.select([0, 1])) == [4, 0]
    assert Classes("a", "label", [rows], model(names[::-1])).labels(rows.select([0, 1])) == [0, 4]
    with pytest.raises(DataError, match=r"row 2: label None: the row has no label"):
        Classes("a", "label", [rows], model(5)).labels(rows)
    with pytest.raises(DataError, match=r"the model has no class 'a'. It has '1', 'b'"):
        Classes("a", "label", [rows], model(["1", "b"]))
    first, second = declared([0, 1], ["b", "a"]), declared([0, 1], ["a", "b"])  # no common order: alphabetical
    classes = Classes("a", "label", [first, second], model(2))
    assert [classes.labels(split) for split in (first, second)] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "images"])
def test_digits_in_files(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    """The text or the colour of a row tells its label."""
    labels = [0, 2, 3, 10, 11]
    path = tmp_path / f"rows.{kind}"
    config = model(12)
    config.vocab_size, config.image_size = 10, 4
    if kind == "images":
        for label in labels:
            (path / str(label)).mkdir(parents=True)
            Image.new("RGB", (4, 4), (label, 0, 0)).save(path / str(label) / "image.png")
    elif kind == "jsonl":
        write_lines(path, [{"text": "a " * (label + 1), "label": str(label)} for label in labels])
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text(f"text{mark}label\n" + "".join(f"{'a ' * (label + 1)}{mark}{label}\n" for label in labels))
    task = "image-classification" if kind == "images" else "sequence-classification"
    data = load_data(str(path), tokenizer=tokenizer, config=config, task=task)
    for batch in [*data.train, *data.eval]:
        if kind == "images":
            told = (batch.kwargs["pixel_values"][:, 0, 0, 0] * 255).round().long()
        else:
            told = batch.kwargs["attention_mask"].sum(1) - 3
        assert batch.labels.tolist() == told.tolist()


def test_a_limit_keeps_the_numbers(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": word, "label": word} for word in "cba"])
    for seed in range(6):
        (batch,) = load_data(path, tokenizer=tokenizer, config=config, limit=1, seed=seed, eval_fraction=0).train
        assert batch.labels.item() == batch.kwargs["input_ids"][0, 1].item() - 5


def test_column_that_one_split_lacks(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "a", "label": 0}])
    write_lines(tmp_path / "test.jsonl", [{"text": "a", "klass": 0}])
    with pytest.raises(DataError, match=r"split of .* to evaluate on has no column 'label'. Its columns: text, klass"):
        load_data(str(tmp_path), tokenizer=tokenizer, config=config)


def test_labels_of_two_types_in_one_file(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (2, "1", None, 0)))
    with pytest.raises(DataError, match="row 2: label None: the row has no label"):
        load_data(str(path), tokenizer=tokenizer, config=config)
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in (2, "1", 0)))
    (batch,) = load_data(str(path), tokenizer=tokenizer, config=config, eval_fraction=0).train
    assert sorted(batch.labels.tolist()) == [0, 1, 2]
