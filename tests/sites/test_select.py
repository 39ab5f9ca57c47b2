"""Sites are chosen by path and by what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import UsageError
from surgeon.passes import Moeify
from surgeon.sites.ffn import FFN


class Net(nn.Module):
    """Twelve feed-forward layers: GELU, but ReLU in every third, and wider from the eighth on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            nn.Sequential(nn.Linear(4, width), nn.ReLU() if index % 3 == 0 else nn.GELU(), nn.Linear(width, 4))
            for index in range(12)
            for width in [16 if index < 8 else 32]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def graph() -> surgeon.TracedGraph:
    return surgeon.trace(Net().eval(), torch.randn(2, 4))


@pytest.fixture(scope="module")
def ffns(graph: surgeon.TracedGraph) -> list[FFN]:
    return surgeon.find_ffns(graph)[0]


@pytest.mark.parametrize(
    ("paths", "wanted", "layers"),
    [
        ((), {}, range(12)),
        (("layer.[3-7]",), {"activation": "gelu"}, [4, 5, 7]),
        (("layer.[3-7]", "layer.11"), {"hidden": 32}, [11]),
        (("*.1?",), {"activation": "relu"}, []),
        ((), {"activation": "r*", "gated": False}, [0, 3, 6, 9]),
        ((), {"hidden": (16, 32), "path": "layer.1*"}, [1, 10, 11]),
        ((), {"activation": ["relu", "gelu"], "gated": True}, []),
        ((), {"activation": "GELU"}, []),
    ],
)
def test_by_path_and_attribute(ffns: list[FFN], paths: Any, wanted: Any, layers: Any) -> None:
    assert [site.path for site in surgeon.select(ffns, *paths, **wanted)] == [f"layer.{index}" for index in layers]


def test_what_is_chosen_is_what_a_pass_changes(graph: surgeon.TracedGraph, ffns: list[FFN]) -> None:
    chosen = [site.path for site in surgeon.select(ffns, "layer.[3-7]")]
    by_pattern = Moeify(experts=2, only=("layer.[3-7]",)).explain(graph)[0]
    assert chosen == [site.path for site in by_pattern]
    assert chosen == [site.path for site in Moeify(experts=2, only=tuple(chosen)).explain(graph)[0]]


def test_wrong_arguments(ffns: list[FFN], graph: surgeon.TracedGraph) -> None:
    for call, words in (
        (
            lambda: surgeon.select(ffns, activaton="gelu"),
            "no attribute 'activaton'. Did you mean 'activation'?",
        ),
        (lambda: surgeon.select(ffns, zzz=1), "FFN has no attribute 'zzz'. There are: activation, calls, "),
        (lambda: surgeon.select(ffns, 3), "select takes paths as texts"),  # type: ignore[arg-type]
        (lambda: surgeon.select(surgeon.find_ffns(graph)), "give found[0]."),
        (lambda: surgeon.select("layer"), "select takes a list of sites"),
        (lambda: surgeon.select(3), "select takes a list of sites"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert words in str(error.value)
