"""`surgeon bench linear`: linear layers that skip inputs."""

from __future__ import annotations

import pytest

from .harness import Run

pytestmark = pytest.mark.usefixtures("small_machine")
SMALL = ("--d-in", "64", "--d-out", "32", "--seconds", "0.0001", "--device", "cpu")


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda model, **_: model)


def test_layers_are_timed_and_compared(run: Run) -> None:
    grid = ("--tokens", "1,4", "--share", "0.25,1", "--dtype", "float32,bfloat16,int8")
    result = run("bench", "linear", *SMALL, *grid, "--output", "json")
    assert result.code == 0, result.err
    found = result.json
    assert set(found) == {"machine", "cells"}
    assert [(c["dtype"], c["tokens"], c["share"]) for c in found["cells"]] == [
        (dtype, tokens, share) for dtype in ("float32", "bfloat16", "int8") for tokens in (1, 4) for share in (0.25, 1)
    ]
    for cell in found["cells"]:
        assert cell["kept"] == pytest.approx(cell["share"], abs=0.08)
        assert cell["kept"] <= cell["rows"] <= 1.0
        assert (cell["rows"] > cell["kept"]) == (cell["tokens"] > 1 and cell["share"] < 1)
        assert cell["error"] < (2e-2 if cell["dtype"] == "bfloat16" else 1e-5)
        for state in ("warm", "cold"):
            times = cell[state]
            assert list(times) == ["dense", "compiled", "ours"]
            assert min(times.values()) > 0
            assert cell[f"{state}_gain"] == min(times["dense"], times["compiled"]) / times["ours"]


def test_the_table_shows_every_layer(run: Run) -> None:
    shown = run("bench", "linear", *SMALL, "--dtype", "float32").out
    assert shown.count("64 → 32") == 3
    assert "gain: the faster of dense and compiled, over ours." in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--dtype", "int4"), "--dtype int4: choose from float32, bfloat16, float16, int8."),
        (("--d-in", "0"), "--d-in 0: give whole numbers of at least 1, separated by commas."),
        (("--share", "2"), "--share 2: give numbers above 0 and up to 1, separated by commas."),
    ],
)
def test_wrong_options_are_told(run: Run, options: tuple[str, ...], told: str) -> None:
    result = run("bench", "linear", *options)
    assert result.code == 2
    assert told in result.err
