"""Inputs that a call leaves out: read from the sizes, filled in, or refused in words."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.graph.missing import changes_something, definition, fill_missing, parameters, refuse_untraced
from surgeon.graph.sizes import Input, Sizes, same_constant

LINE = (
    "int(ids[batch, tokens]), int(mask[batch, tokens]) or ones(int64), kinds[2 * tokens] or zeros(float16), "
    "int(places[1, tokens]) or positions(int32), bool(far[batch]) or needed, flag == True or None, other == 3 or "
    "missing, 1 <= batch, 1 <= tokens, untraced(labels=[None], use_cache=[None, False], keep=[0])"
)
IDS, FAR = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.bool)


def test_one_line_and_back() -> None:
    sizes = Sizes.parse(LINE)
    assert str(sizes) == LINE
    assert [given.optional for given in sizes.inputs] == [False, True, True, True, False, True, True]
    assert sizes.untraced == {"labels": (None,), "use_cache": (None, False), "keep": (0,)}


@pytest.mark.parametrize(
    "line",
    [
        *("x[3] or ones", "x[3] or ones(list)", "x[3] or eye(int64)", "x[3] or ones(int64, int64)", "x[3] or 1"),
        *("x[3], untraced(y=None)", "x[3], untraced(y=[])", "x[3], untraced(y=[[1]])", "x[3], untraced(self=[None])"),
    ],
)
def test_anything_else_is_not_read(line: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Sizes.parse(line)


def test_what_stands_for_missing_inputs() -> None:
    ids, mask, kinds, places, far, flag, other = fill_missing(LINE, IDS, None, None, None, FAR, None, 3)
    assert ids is IDS
    assert far is FAR
    assert torch.equal(mask, torch.ones_like(IDS))
    assert torch.equal(kinds, torch.zeros(10, dtype=torch.float16))
    assert torch.equal(places, torch.arange(5, dtype=torch.int32)[None])
    assert places.is_contiguous()
    assert (flag, other) == (True, 3)
    given = (IDS, IDS + 1, torch.ones(10), IDS, FAR, False, 4)
    assert all(a is b for a, b in zip(fill_missing(LINE, *given), given, strict=True))


@pytest.mark.parametrize("ids", [None, torch.ones(()), "text"])
def test_wrong_inputs_are_left_to_the_check(ids: Tensor | str | None) -> None:
    assert fill_missing(LINE, ids, None, None, None, FAR, True, 3)[0] is ids


def test_what_is_needed_is_missed_in_words() -> None:
    words = Sizes.parse(LINE).violation(fill_missing(LINE, IDS, None, None, None, None, True, 3))
    assert words == "far is missing, and nothing that could stand for it gives what the model gives then"


def test_parameters() -> None:
    names = [given.name for given in Sizes.parse(LINE).inputs]
    found = parameters(Sizes.parse(LINE), names, {name: place for place, name in enumerate(names)})
    assert definition(found) == (
        "ids, mask=None, kinds=None, places=None, far=None, flag=None, other=3, *, labels=None, use_cache=None, keep=0"
    )
    assert definition(parameters(Sizes((Input("a"),)), ["a", "b"], {"a": 0})) == "a, b"
    assert inspect.Signature(found).bind(1).arguments == {"ids": 1}


@pytest.mark.parametrize(
    ("value", "accepted", "changes"),
    [(None, (None,), False), (0, (None, False), True), (False, (None, False), False), (2, (0, 2.0), False)],
)
def test_values_that_change_nothing(value: object, accepted: tuple[float | None, ...], changes: bool) -> None:
    assert eval(changes_something("x", accepted), {"x": value, "surgeon_same": same_constant}) is changes
    if not changes:
        refuse_untraced(f"x[3], untraced(x={list(accepted)})", x=value)


def test_what_was_not_traced_is_refused_in_words() -> None:
    refuse_untraced(LINE, labels=None, use_cache=False, keep=0)
    with pytest.raises(UsageError, match=r"labels is a tensor, but the graph was traced without it .*None is as good"):
        refuse_untraced(LINE, labels=IDS)
    with pytest.raises(UsageError, match=r"use_cache is True.*None or False is as good.*"):
        refuse_untraced(LINE, use_cache=True, labels=IDS)
