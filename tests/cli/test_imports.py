"""What commands do not import, because they do not use it: it would take longer than their work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

RUN = """
import sys
from surgeon.cli import app
names = sys.argv.pop(1).split(",")
try:
    app(prog_name="surgeon")
finally:
    print("imported:", *(name for name in names if name in sys.modules), file=sys.stderr)
"""
# What reading a saved graph with torch.export brings along is not here.
UNUSED = (
    *("torchao", "sklearn", "scipy", "openvino", "onnx", "onnxruntime", "datasets", "pandas", "accelerate"),
    *("matplotlib", "safetensors", "surgeon.jobs.apply"),
)
COMPILERS = ("sympy", "networkx", "torch._dynamo", "torch._inductor", "torch.export._trace")
TEXT = ("torch", "numpy", "transformers", "sympy", "triton", "surgeon.passes.base")


def imported(shelf: Path, names: Iterable[str], *args: str) -> list[str]:
    """Which of these modules a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(names), *args],
        capture_output=True, text=True, check=False, cwd=shelf, env={**os.environ, "SURGEON_CPU": "torch"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("imported:"), done.stderr
    return last.split()[1:]


@pytest.mark.parametrize("args", [("--help",), ("passes",), ("passes", "moeify"), ("inspect", "--help")])
def test_text_needs_no_torch(shelf: Path, args: tuple[str, ...]) -> None:
    assert imported(shelf, (*UNUSED, *COMPILERS, *TEXT), *args) == []


def test_what_passes_changed_is_read_without_compilers(shelf: Path) -> None:
    assert imported(shelf, ("torch", "transformers", *UNUSED, *COMPILERS), "diff", "bert-moe") == ["torch"]


@pytest.mark.parametrize("args", [("inspect", "masked"), ("diff", "masked", "masked"), ("set", "masked")])
def test_a_saved_surgery_is_read_without_what_made_it(shelf: Path, args: tuple[str, ...]) -> None:
    names = ("torch", "transformers", "surgeon.passes.moeify", *UNUSED)
    assert imported(shelf, names, *args) == ["torch"]


def test_tokenizers_are_left_where_they_are_not_used(shelf: Path) -> None:
    names = ("transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert", *UNUSED)
    assert imported(shelf, names, "inspect", "bert-moe") == []
