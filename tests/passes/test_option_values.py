"""Options of another type, or out of range, are refused in words when a pass is made in Python."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from surgeon.errors import UsageError
from surgeon.passes import HaltTokens, Lower, Moeify, Sparsify, SwapActivation
from surgeon.passes.registry import all_passes

OPTIONS = [(kind, field.name) for kind in all_passes().values() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    "value", [object(), "-", float("nan"), {"*": object()}, (1,)], ids=["object", "text", "nan", "dict", "tuple"]
)
def test_every_option_refuses_other_types(value: Any) -> None:
    for kind, name in OPTIONS:
        with pytest.raises(UsageError, match=rf"^{kind.name}: {name} is .*, but must be "):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Moeify(experts="8"),  # type: ignore[arg-type]
            "moeify: experts is '8', but must be a whole number at least 1, a dict of such values by pattern of paths, "
            "or None.",
        ),
        (lambda: Moeify(experts={"*": 0}), "moeify: experts is 0, but must be at least 1."),
        (lambda: Moeify(tau="0.1"), "moeify: tau is '0.1', but must be a number from 0 to 1."),  # type: ignore[arg-type]
        (lambda: Moeify(experts=True), "moeify: experts is True, but must be a whole number"),
        (lambda: Moeify(share_trunk="yes"), "moeify: share_trunk is 'yes', but must be True or False."),  # type: ignore[arg-type]
        (lambda: Lower(only="*.0"), "lower: only is '*.0', but must be a tuple of texts."),  # type: ignore[arg-type]
        (lambda: SwapActivation(to=3), "swap-activation: to is 3, but must be one of relu, "),  # type: ignore[arg-type]
        (lambda: HaltTokens(beta=None), "halt-tokens: beta is None, but must be a number."),  # type: ignore[arg-type]
    ],
)
def test_the_message_says_what_goes(make: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value).startswith(words)


def test_lists_and_numbers_of_other_libraries_count_as_pythons_own() -> None:
    assert Lower(only=["a", "b"]) == Lower(only=("a", "b"))  # type: ignore[arg-type]
    made = Moeify(experts={"*": np.int64(4)})  # type: ignore[dict-item]
    assert made == Moeify(experts={"*": 4})
    assert type(made.experts["*"]) is int  # type: ignore[index]
    assert type(Sparsify(alpha=np.float32(0.5)).alpha) is float  # type: ignore[arg-type]
