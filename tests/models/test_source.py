"""What holds for every way to load a model: paths that are none, hashes, and values that are not finite."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from surgeon.errors import LoadError, TraceError
from surgeon.models.source import check_finite, load_model
from surgeon.models.weight_files import sha256_of


def test_missing_path() -> None:
    with pytest.raises(LoadError, match=r"No file or directory 'openai/gpt2'.*not downloaded.*hf download openai/gpt2"):
        load_model("openai/gpt2")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"model.onnx: cannot load .onnx files"):
        load_model(tmp_path / "model.onnx")


def test_function_whose_model_has_no_values(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 2, device='meta')\n")
    with pytest.raises(TraceError, match="'weight' is on the device meta"):
        load_model(f"{tmp_path / 'empty.py'}:make")


def test_hash_of_several_files_depends_on_names_and_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    digest = sha256_of([first, second])
    assert digest == sha256_of([second, first])
    shutil.move(second, tmp_path / "c")
    assert digest != sha256_of([first, tmp_path / "c"])


def test_check_finite(net: nn.Module) -> None:
    check_finite(net)
    with torch.no_grad():
        net.linear.weight[0, :2] = torch.tensor([float("nan"), float("inf")])
        net.linear.bias[0] = float("nan")
    with pytest.raises(LoadError, match=r"2 of the 12 values of linear.weight are .* Parameters affected: 2"):
        check_finite(net)
