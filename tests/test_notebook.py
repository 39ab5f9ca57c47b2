"""The notebook of examples runs, and gives the outputs that are stored in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    """The script that executes the notebook."""
    spec = importlib.util.spec_from_file_location("execute", EXAMPLES / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def both(execute: ModuleType) -> tuple[Any, Any]:
    """The notebook as it is stored, and as a new run gives it."""
    return nbformat.read(execute.NOTEBOOK, as_version=4), execute.executed()


def outputs(notebook: Any, tag: str) -> list[str]:
    """The text of the results of cells with a tag."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    return [out.data["text/plain"] for cell in cells for out in cell.outputs if out.output_type == "execute_result"]


def kinds(notebook: Any) -> list[set[str]]:
    """The kinds of outputs of each cell."""
    return [
        {kind for out in cell.get("outputs", ()) for kind in out.get("data", ("stderr",))} for cell in notebook.cells
    ]


def test_cells_give_what_is_stored(both: tuple[Any, Any]) -> None:
    stored, new = both
    assert [cell.source for cell in stored.cells] == [cell.source for cell in new.cells]
    assert outputs(new, "same") == outputs(stored, "same")
    assert len(outputs(new, "same")) == 5
    assert "swap-activation, sparsify, moeify, lower" in outputs(new, "same")[2]
    assert kinds(new) == kinds(stored)
    assert not any("stderr" in found for found in kinds(new))


def test_numbers_are_near_those_that_are_stored(both: tuple[Any, Any]) -> None:
    (before,), (after,) = (outputs(notebook, "near") for notebook in both)
    numbers = [[float(number) for number in re.findall(r": ([\d.]+)", text)] for text in (before, after)]
    assert len(numbers[0]) == 4
    assert numbers[1] == pytest.approx(numbers[0], abs=0.08)


def test_a_cell_that_fails_is_an_error(execute: ModuleType, tmp_path: Path) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.executed(tmp_path / "broken.ipynb")
