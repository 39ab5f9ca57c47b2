"""The sizes a graph holds for: written and read as one line, checked at calls, and explained where they are broken."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import SizeError
from surgeon.graph.size_check import check_sizes
from surgeon.graph.sizes import Axis, Input, Sizes, check_expression, evaluate, names_in, substitute

SIZES = Sizes(
    (
        *(Input("ids", ("batch", "tokens"), kind="int"), Input("mask", ("batch", "tokens"), kind="bool")),
        *(Input("image", ("batch", 3, 8)), Input("twice", ("2 * tokens",)), Input("one", ())),
        *(Input("flag", None, True, True), Input("other")),
    ),
    {"batch": Axis(0), "tokens": Axis(4, 512, 4)},
    ("batch != 7", "tokens >= batch"),
    {"batch": 2, "tokens": 8},
)
SHORT_MASK = torch.ones(2, 4, dtype=torch.bool)
LINE = (
    "int(ids[batch, tokens]), bool(mask[batch, tokens]), image[batch, 3, 8], twice[2 * tokens], one[()], flag == True, "
    "other, 0 <= batch, 4 <= tokens <= 512, tokens % 4 == 0, batch != 7, tokens >= batch, traced(batch=2, tokens=8)"
)


def call(batch: int = 2, tokens: int = 8, **changed: object) -> tuple[object, ...]:
    given: dict[str, object] = {
        "ids": torch.ones(batch, tokens, dtype=torch.int32),
        "mask": torch.ones(batch, tokens, dtype=torch.bool),
        "image": torch.ones(batch, 3, 8),
        "twice": torch.ones(2 * tokens),
        "one": torch.ones(()),
        "flag": True,
        "other": object(),
    }
    return tuple({**given, **changed}.values())


def test_one_line_and_back() -> None:
    assert str(SIZES) == LINE
    assert Sizes.parse(LINE) == SIZES
    assert Sizes.parse("") == Sizes()
    constants = Sizes((Input("a", None, "x, y", True), Input("b", None, None, True), Input("c", None, -1.5, True)))
    assert Sizes.parse(str(constants)) == constants


@pytest.mark.parametrize(
    "line",
    [
        *("x[batch", "x[batch], y[", "x[len(batch)], 1 <= batch", "x[1.5]", "x[batch.real], 1 <= batch", "f(x)"),
        *("x[batch], 1 <= batch, batch ** 99 > 2", "x[batch], 1 <= batch, tokens > 2", "x[3], 1 <= batch", "'x'"),
        *("x[batch], 1 <= batch, __import__ != 1", "x[batch], 1.5 <= batch", "x[batch], 1 <= batch, [1 for _ in x]"),
        *("x == [1], 1 <= y", "x[batch], 1 <= batch, (lambda: 1)() == 1", "x[batch], 1 <= batch, 'a' * batch == 1"),
        "x[batch], 1 <= batch, " + "1 + " * 5000 + "1 > batch",
    ],
)
def test_anything_else_is_not_read(line: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Sizes.parse(line)


@pytest.mark.parametrize(
    "sizes", [{}, {"batch": 0}, {"batch": 1, "tokens": 4}, {"batch": 8, "tokens": 512}, {"batch": 12, "tokens": 12}]
)
def test_sizes_within_pass(sizes: dict[str, int]) -> None:
    inputs = call(**sizes)
    check_sizes(LINE, *inputs)
    check_sizes(LINE, *call(**sizes, ids=inputs[0].bool(), image=inputs[2].half()))  # type: ignore[attr-defined]
    assert SIZES.violation(inputs) is None


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (call(tokens=516), "dimension 1 of ids [2, 516] is 516, but the graph takes tokens: 4 to 512, multiples of 4"),
        (call(tokens=0), "dimension 1 of ids [2, 0] is 0, but the graph takes tokens: 4 to 512, multiples of 4"),
        (call(tokens=6), "dimension 1 of ids [2, 6] is 6, but the graph takes tokens: 4 to 512, multiples of 4"),
        (
            call(mask=torch.ones(2, 4, dtype=torch.bool)),
            "dimension 1 of mask [2, 4] is 4, but tokens is 8 in dimension 1 of ids [2, 8]",
        ),
        (call(image=torch.ones(2, 4, 8)), "dimension 1 of image [2, 4, 8] is 4, but the graph only takes 3"),
        (
            call(image=torch.ones(2, 3)),
            "image has 2 dimensions [2, 3], but the graph was traced with image[batch, 3, 8]",
        ),
        (call(twice=torch.ones(8)), "dimension 0 of twice [8] is 8, but 2 * tokens is 16"),
        (call(one=torch.ones(1)), "one has 1 dimensions [1], but the graph was traced with one[()]"),
        (call(batch=7), "the sizes {'batch': 7, 'tokens': 8} break the condition batch != 7"),
        (call(batch=9), "the sizes {'batch': 9, 'tokens': 8} break the condition tokens >= batch"),
        (call(ids=torch.ones(2, 8)), "ids is of dtype torch.float32, but the graph was traced with int"),
        (
            call(mask=torch.ones(2, 8, dtype=torch.long)),
            "mask is of dtype torch.int64, but the graph was traced with bool",
        ),
        (
            call(one=torch.ones((), dtype=torch.uint8)),
            "one is of dtype torch.uint8, but the graph was traced with float",
        ),
        (call(flag=False), "flag is False, but the graph was traced with True"),
        (call(ids=None), "ids is None, but the graph was traced with a tensor"),
        (call(ids=[1]), "ids is of type list, but the graph was traced with a tensor"),
    ],
)
def test_sizes_beyond_are_refused_and_explained(inputs: tuple[object, ...], words: str) -> None:
    with pytest.raises(SizeError) as error:
        check_sizes(LINE, *inputs)
    assert words in str(error.value)
    assert "It was traced with batch 2, tokens 8." in str(error.value)
    assert "trace the model with example inputs of the sizes you need" in str(error.value)


def test_axes() -> None:
    assert [size for size in range(20) if size in Axis(3, 12, 4)] == [4, 8, 12]
    assert 10**9 in Axis()
    assert 0 not in Axis()
    assert [str(axis) for axis in (Axis(), Axis(2, 9), Axis(4, None, 4))] == [
        *("1 or more", "2 to 9", "4 or more, multiples of 4"),
    ]
    assert SIZES.allow({"batch": 2, "tokens": 8})
    assert not SIZES.allow({"batch": 2, "tokens": 9})
    assert not SIZES.allow({"batch": 9, "tokens": 8})


def test_expressions() -> None:
    assert evaluate("(-a) % 4 + max(a, b) // 2", {"a": 5, "b": 9}) == 7
    assert evaluate("a // b", {"a": 5, "b": 0}) == 0
    assert names_in("max(a, 2) + b") == {"a", "b"}
    assert substitute("a + b", {"a": "2 * c"}) == "2 * c + b"
    check_expression("a ** 2 == b and not a < -3", ("a", "b"))
    for text in ("c", "a.b", "a[0]", "pow(a, 2)", "a / b", "a if b else 1", "f'{a}'", "a := 1", "", "a ** b"):
        with pytest.raises(ValueError, match=r"\w"):
            check_expression(text, ("a", "b"))
