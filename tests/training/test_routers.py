"""Routers in training: what their layers are given is read once, held, and gone through in other orders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.data.data import Data
from surgeon.graph.traced import fork
from surgeon.moe.router import Goal, Router
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify
from surgeon.training.loop import Precision
from surgeon.training.observe import collect
from tests.passes.experts import layer
from tests.small_models import WIDTH


class Counted(list[Any]):
    """Batches, and how many of them were read."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.read += 1
            yield item


# What three of the four batches hold: tokens, or floats of both layers.
@pytest.mark.parametrize(("limit", "least"), [("_TOKENS", 300), ("_MOST_HELD", 300 * 2 * (WIDTH + 8))])
def test_the_model_runs_over_the_data_once_for_all_epochs(
    limit: str, least: int, sharp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, data, seen = fork(sharp[0]), Counted(sharp[1]), defaultdict(list)
    original = Goal.error

    def error(self: Goal, router: Router, x: Tensor, wanted: Tensor) -> Tensor:
        seen[router].append(x)
        return original(self, router, x, wanted)

    monkeypatch.setattr(Goal, "error", error)
    monkeypatch.setattr(f"surgeon.training.routers.{limit}", least)
    report = Moeify(experts=8, split="weights", router="trained", epochs=5).apply(graph, data=data)
    assert data.read == len(data) == 4
    assert report.fit is not None
    assert (report.fit.steps, report.fit.epochs) == (20, 5)
    for site in find_moes(graph):
        name = site.nodes[0].args[0].name  # type: ignore[union-attr]
        values = collect(graph, [name], Data.of(sharp[1]), tokens=10**6)[name]
        given = seen[layer(graph, site.path).router]
        # Every token as often as any other, first those of three batches, each time in another order.
        for tokens, part in ((values[:384], given[:15]), (values[384:], given[15:])):
            rows = torch.cat(part)
            torch.testing.assert_close(rows.sort(0).values, tokens.repeat(5, 1).sort(0).values)
            assert not torch.allclose(rows[: len(tokens)], tokens)
            assert not torch.allclose(rows[: len(tokens)], rows[-len(tokens) :])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_runs_in_the_precision_of_the_fit(
    precision: Precision, sharp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = []
    original = Goal.wanted

    def wanted(self: Goal, x: Tensor, *rest: Any) -> Tensor:
        mixed.append(torch.is_autocast_enabled("cpu"))
        return original(self, x, *rest)

    monkeypatch.setattr(Goal, "wanted", wanted)
    given = Moeify(experts=8, split="weights", router="trained", epochs=1, precision=precision)
    given.apply(fork(sharp[0]), data=sharp[1])
    assert set(mixed) == {precision == "bfloat16"}
