"""Passes by name, as typed on a command line and as written in a recipe."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgeon.errors import UsageError
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify, SwapActivation
from surgeon.passes.options import option_types
from surgeon.passes.registry import all_passes
from surgeon.surgery.recipe import build, find_pass


def test_passes_are_found_by_name() -> None:
    assert [find_pass(name) for name in all_passes()] == list(all_passes().values())
    assert build(["moeify", "lower"]) == [Moeify(), Lower()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moefy", "No pass 'moefy'. Did you mean 'moeify'?"),
        ("swap_activation", "No pass 'swap_activation'. Did you mean 'swap-activation'?"),
        (
            "xyz",
            "No pass 'xyz'. There are: mlpify, rotate, halt-tokens, swap-activation, sparsify, early-exit, ",
        ),
        ("", "No pass ''."),
    ],
)
def test_unknown_pass(name: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        build([name])
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    ("name", "typed", "want"),
    [
        ("moeify", {"experts": "16"}, Moeify(experts=16)),
        ("moeify", {"experts": "none", "expert_size": "8"}, Moeify(expert_size=8)),
        ("moeify", {"clip": ""}, Moeify(clip=None)),
        ("moeify", {"tau": "0.25", "steps": "100"}, Moeify(tau=0.25, steps=100)),
        ("moeify", {"only": "a.*, b ,"}, Moeify(only=("a.*", "b"))),
        ("moeify", {"only": ""}, Moeify()),
        ("sparsify", {"alpha": "1e-3", "alpha_schedule": "constant"}, Sparsify(alpha=1e-3, alpha_schedule="constant")),
        ("swap-activation", {"to": "silu"}, SwapActivation(to="silu")),
        ("mlpify", {"cost_factor": 2}, Mlpify(cost_factor=2.0)),
        ("lower", {"skip": ["x"]}, Lower(skip=("x",))),
    ],
)
def test_values_as_typed(name: str, typed: Any, want: Any) -> None:
    assert build([name], {name: typed}) == [want]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moeify": {"expert": "4"}}, "moeify has no option 'expert'. Did you mean 'experts'?"),
        ({"moeify": {"zzz": "4"}}, "moeify has no option 'zzz'. There are: only, skip,"),
        ({"moeify": {"experts": "many"}}, "moeify.experts=many: "),
        ({"moeify": {"experts": "1.5"}}, "moeify.experts=1.5: "),
        ({"moeify": {"tau": "2"}}, "moeify: tau is 2.0"),
        ({"moeify": {"schedule": "steep"}}, "moeify.schedule=steep: "),
        ({"sparsify": {"alpha": "1"}}, "Options were given for 'sparsify', which is not among the passes: moeify."),
        ({"moefy": {"tau": "1"}}, "No pass 'moefy'. Did you mean 'moeify'?"),
    ],
)
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        build(["moeify"], options)
    assert str(error.value).startswith(words)


def test_option_types() -> None:
    types = option_types(Moeify)
    assert types["experts"] == int | dict[str, int] | None
    assert types["tau"] is float
    assert {"only", "skip", "epochs", "lr", "router_width"} <= set(types)


@pytest.mark.parametrize("one", [
    Moeify(experts=8, only=("a", "b"), clip=None), Sparsify(alpha=0.5, steps=3), Mlpify(activation="gelu"), Lower(),
    SwapActivation(to="relu2", skip=("x.*",)),
])  # fmt: skip
def test_options_build_the_same_pass(one: Any) -> None:
    assert build([one.name], {one.name: json.loads(json.dumps(one.options()))}) == [one]
