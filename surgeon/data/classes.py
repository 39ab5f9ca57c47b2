"""Read the labels of classification data as the model's class numbers.

One rule for all kinds of files, applied to the labels of all splits together:

1. Names that the model knows (`id2label` and `label2id` of its config) are the model's classes.
2. Whole numbers are class numbers, also when they are text ("3", "03", "3.0"); true and false are 1 and 0.
3. Other names need a model without class names (or with the names LABEL_0, LABEL_1, ...) and as many classes as the
   data. They are numbered in the order that a `ClassLabel` of the dataset declares, else alphabetically.

Everything else is refused, because any number would be a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgeon.errors import DataError, UsageError

_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
_TRUTH = {"true": 1, "false": 0}
_GENERIC = re.compile(r"LABEL_\d+")  # the names that transformers gives classes without names


class Classes:
    """Converts a label column to the model's class numbers."""

    def __init__(self, spec: str, column: str, splits: Sequence[Any], config: Any | None) -> None:
        """Learn the classes.

        Args:
            spec: names the data in errors. splits: all of it, each split with the column.
            config: the model's. None if it has none.

        Raises:
            DataError: the model does not know a class name, or the names cannot be numbered without guessing.
        """
        self.spec = spec
        self.column = column
        self.count: int | None = getattr(config, "num_labels", None)
        self.known, self.generic = _names_of(config, spec)
        self.numbers = self._numbers(splits)

    def _numbers(self, splits: Sequence[Any]) -> Mapping[str, int]:
        """Return the number of each class name in the data."""
        names = sorted({value for rows in splits for value in self._values(rows) if _is_name(value)})
        if not names:
            return {}
        if all(name in self.known for name in names):
            return self.known
        if self.generic and (own := [name for name in names if _GENERIC.fullmatch(name)]):
            # The model's own names, of which some are another model's: no rule could tell what the others mean.
            unknown = [name for name in names if name not in self.known]
            raise DataError(
                f"{self.spec}: labels like {own[0]!r} are names of the model's classes, but {_some(unknown)} is none. "
                f"It has {_some(self.known)}."
            )
        declared = self._declared(splits)
        if declared is not None and self.generic:
            return {name: number for number, name in enumerate(declared)}
        whole = {name: _whole(name) for name in names}
        renamed = any(self.known.get(name, number) != number for name, number in whole.items())
        if None not in whole.values() and not renamed:
            return self._distinct({name: number for name, number in whole.items() if number is not None})
        if not self.generic:
            unknown = [name for name in names if name not in self.known]
            raise DataError(f"{self.spec}: the model has no class {_some(unknown)}. It has {_some(self.known)}.")
        strange = [name for name in names if whole[name] is None]
        if any(_is_number(name) for name in strange):
            number = next(name for name in strange if _is_number(name))
            raise DataError(f"{self.spec}: label {number!r} is not a class. Regression is not supported.")
        hint = "Name the model's classes in its config.json (id2label and label2id)."
        if len(strange) < len(names):
            numbers = [name for name in names if name not in strange]
            raise DataError(
                f"{self.spec}: some labels are numbers ({_some(numbers)}) and some are names ({_some(strange)}). {hint}"
            )
        if self.count is not None and len(names) != self.count:
            raise DataError(
                f"{self.spec} has {len(names)} class names ({_some(names)}), but the model has {self.count} classes "
                f"without names, so their numbers are unknown. {hint}"
            )
        return {name: number for number, name in enumerate(names)}

    def _distinct(self, numbers: dict[str, int]) -> dict[str, int]:
        by_number: dict[int, str] = {}
        for name, number in numbers.items():
            other = by_number.setdefault(number, name)
            if other != name:
                raise DataError(f"{self.spec}: the labels {other!r} and {name!r} are one number. Write them alike.")
        return numbers

    def _declared(self, splits: Sequence[Any]) -> Sequence[str] | None:
        """Return the class names in the order that the dataset declares, if all splits declare the same.

        For a folder of images `datasets` declares the names of its folders in alphabetical order, which means nothing.
        """
        lists = [getattr(rows.features[self.column], "names", None) for rows in splits]
        inferred = any(rows.info.builder_name == "imagefolder" for rows in splits)
        return lists[0] if not inferred and all(names == lists[0] for names in lists) else None

    def _values(self, rows: Any) -> Iterator[Any]:
        """Iterate over the labels of a split. A number that stands for a declared name becomes the name."""
        names = getattr(rows.features[self.column], "names", None)
        for value in rows[self.column]:
            if names is None or value is None:
                yield value
            else:
                yield names[value] if value >= 0 else None  # -1 is "no label"

    def labels(self, rows: Any) -> list[int]:
        """Return the class of each row.

        Raises:
            DataError: a label is missing, not a class, or out of range. The message names the row.
        """
        return [self._label(value, index) for index, value in enumerate(self._values(rows))]

    def _label(self, value: Any, index: int) -> int:
        where = f"{self.spec}, row {index}: label {value!r}"
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where}: the row has no label.")
        if isinstance(value, float):
            if not math.isfinite(value):
                raise DataError(f"{where} is not finite.")
            if value != int(value):
                raise DataError(f"{where} is not a class. Regression is not supported.")
        if not isinstance(value, int | float | str):
            raise DataError(f"{where} is a {type(value).__name__}, not a class.")
        number = self.numbers[value] if isinstance(value, str) else self._as_number(int(value), where)
        if number < 0 or (self.count is not None and number >= self.count):
            allowed = "0 or more" if self.count is None else f"0 to {self.count - 1}"
            hint = " Classes are counted from 0." if number == self.count else ""
            raise DataError(f"{where} is class {number}, out of range: {allowed}.{hint}")
        return number

    def _as_number(self, number: int, where: str) -> int:
        """Return the number of a label that is a number, unless the model or other rows give it another meaning."""
        if self.numbers and any(_whole(name) is None for name in self.numbers):
            raise DataError(f"{where} is not a class name, unlike the labels of other rows.")
        if self.known.get(str(number), number) != number:
            raise DataError(
                f"{where} can mean class number {number} or the model's class named '{number}', which is number "
                f"{self.known[str(number)]}. Write names as text, or change the names in the model's config.json."
            )
        return number


def check_same_classes(config: Any | None, teacher: Any | None) -> None:
    """Refuse a teacher whose config names other classes than the model's, or the same in another order.

    Args:
        config, teacher: configs of Hugging Face models, or None.

    Raises:
        UsageError: both name their classes, and the names differ.
    """
    (own, own_says_nothing), (other, other_says_nothing) = (
        _names_of(config, "the model"),
        _names_of(teacher, "the teacher"),
    )
    if own_says_nothing or other_says_nothing or own == other:
        return
    raise UsageError(
        f"The teacher's classes are {_in_order(other)}, and the model's are {_in_order(own)} (id2label of their "
        "configs). A teacher must have the same classes in the same order."
    )


def _in_order(numbers: Mapping[str, int]) -> str:
    return _some(sorted(numbers, key=lambda name: numbers[name]))


def _names_of(config: Any | None, spec: str) -> tuple[dict[str, int], bool]:
    """Return the model's class numbers by name, and whether the names say nothing (LABEL_0, LABEL_1, ...)."""
    try:
        by_id = {str(name): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}
        by_name = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{spec}: a class of the model has no number, in id2label or label2id of its config.json: {error}."
        ) from error
    telling = [names for names in (by_id, by_name) if not all(name.startswith("LABEL_") for name in names)]
    if not telling:
        return by_id, True
    differing = [name for name in telling[0] if telling[-1].get(name, telling[0][name]) != telling[0][name]]
    if differing:
        raise DataError(
            f"{spec}: id2label and label2id of the model's config.json give the class {differing[0]!r} different "
            "numbers. Make them agree."
        )
    return telling[0] | telling[-1], False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole(text: str) -> int | None:
    """Return the whole number that a text is, or None."""
    text = text.strip().casefold()
    match = _WHOLE.fullmatch(text)
    return int(match[1]) if match else _TRUTH.get(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _some(names: Sequence[str] | Mapping[str, int]) -> str:
    first = list(names)[:6]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > len(first) else "")
