"""Execute the notebook beside this and store its outputs.

    python examples/execute.py

It needs the extra `test`. Look at the outputs afterwards: tests/test_notebook.py compares those of cells with the tag
"same" letter by letter, and the numbers of cells with the tag "near" with a tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("surgery.ipynb")


def executed(path: Path = NOTEBOOK) -> Any:
    """The notebook with the outputs of a new run, without what differs between runs and machines."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
