"""`--set pass.option=value`, as typed."""

from __future__ import annotations

import pytest

from surgeon.cli.reading import parse_settings
from surgeon.errors import UsageError


def test_settings() -> None:
    typed = [
        "moeify.experts=16",
        "moeify.tau = 0.5",
        "swap-activation.to=silu",
        "sparsify.alpha-schedule=linear",
        "a.b=c=d",
    ]
    assert parse_settings(typed) == {
        "moeify": {"experts": "16", "tau": "0.5"},
        "swap-activation": {"to": "silu"},
        "sparsify": {"alpha_schedule": "linear"},
        "a": {"b": "c=d"},
    }
    assert parse_settings([]) == {}


@pytest.mark.parametrize("setting", ["moeify", "moeify.experts", "experts=16", ".experts=16", "moeify.=16", "="])
def test_wrong_settings(setting: str) -> None:
    with pytest.raises(UsageError, match=r"write pass\.option=value"):
        parse_settings([setting])
