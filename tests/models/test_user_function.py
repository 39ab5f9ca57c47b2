"""Models that a function of the user returns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.source import load_model
from surgeon.models.user_function import call_spec
from tests.models.tiny import NET


@pytest.mark.parametrize("spec", ["mynet:build", "mynet.py:build", "mynet:Net"])
def test_function(net: nn.Module, spec: str) -> None:
    source = load_model(spec)
    assert source.kind == "python"
    assert type(source.model).__name__ == "Net"
    assert len(source.sha256) == 64


def test_hash_of_a_function_is_that_of_its_weights(net: nn.Module) -> None:
    assert load_model("mynet:build").sha256 == load_model("mynet:build").sha256
    assert load_model("mynet:build").sha256 != load_model("mynet:Net").sha256


def test_module_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    try:
        assert load_model("only_here:build").kind == "python"
    finally:
        sys.modules.pop("only_here", None)
    assert sys.path == path


def test_file_imports_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_file.py").write_text(NET)
    (tmp_path / "file.py").write_text("from neighbour_of_file import build")
    try:
        assert load_model(f"{tmp_path}/file.py:build").kind == "python"
    finally:
        sys.modules.pop("neighbour_of_file", None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuchmodule:build", "the Python module 'nosuchmodule' cannot be imported.*PYTHONPATH=."),
        ("nosuchfile.py:build", r"the file nosuchfile.py does not exist"),
        ("mynet:bild", r"mynet has no 'bild'. Did you mean 'build'\?"),
        ("mynet:constant", "'constant' is a int, not a function"),
        ("mynet:broken", "mynet:broken raised RuntimeError: no luck"),
        ("mynet:number", "returned a int, not a torch.nn.Module"),
    ],
)
def test_function_that_fails(net: nn.Module, spec: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(spec)


def test_file_that_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    for _ in range(2):  # a failed import is not remembered
        with pytest.raises(LoadError, match=r"importing .*bad.py raised ZeroDivisionError"):
            load_model(f"{tmp_path}/bad.py:build")


def test_malformed_spec() -> None:
    with pytest.raises(LoadError, match="'a b' is neither module:function"):
        call_spec("a b", LoadError)
