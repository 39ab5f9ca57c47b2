"""The tables of examples/speed are those that its own script makes of the results beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SPEED = Path(__file__).parents[1] / "examples" / "speed"
LAYERS = sorted(SPEED.glob("results/*/layer*.json"))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_tables", SPEED / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_tables_of_layers_are_in_the_readme(path: Path, tables: ModuleType) -> None:
    readme = (SPEED / "README.md").read_text()
    found = list(tables.layer(json.loads(path.read_text())))
    assert found
    for title, table in found:
        assert table in readme, title


def test_a_surgery_without_a_dense_model_has_no_factor(tables: ModuleType) -> None:
    setting = {"executed": 0.21, "ours": 1.0, "compiled": None, "gain": None}
    table = tables.surgery({"times": {"dense": None, "compiled": None, "settings": [setting]}})
    assert table.splitlines()[-1] == "| 21% |  |  | 1 |  |  |"


def test_there_are_results() -> None:
    assert {path.parent.name for path in LAYERS} == {"amx", "avx2", "avx512", "h100", "int8"}


def test_a_row_for_every_engine_and_form(tables: ModuleType) -> None:
    def row(engine: str, experts: bool, milliseconds: float | None, error: float | None) -> dict[str, object]:
        return {
            "engine": engine, "numbers": "int8", "experts": experts, "milliseconds": milliseconds, "error": error
        }  # fmt: skip

    rows = [row("openvino", False, 2.0, 0.01), row("openvino", True, 1.0, 0.123), row("torchao", False, None, None)]
    table = tables.engines({"found": {"rows": rows}})
    assert table.splitlines()[2:] == ["| openvino | int8 | 2 | 1 | 12.3% |"]
