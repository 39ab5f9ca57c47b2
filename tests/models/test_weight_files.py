"""Files written by `torch.save`: no code they hold is run unless it is trusted."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from surgeon.errors import LoadError
from surgeon.models.source import load_model
from tests.models.tiny import halve


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_needs_trust(tmp_path: Path, net: nn.Module, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(net, path, _use_new_zipfile_serialization=zipped)
    expected = "model.pt holds pickled code, which loading would run."
    with pytest.raises(LoadError) as error:
        load_model(path)
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith(" If you trust it: trust_pickle=True.")
    assert error.value.in_command.endswith(" If you trust it: --trust-pickle.")
    source = load_model(path, trust_pickle=True)
    assert source.kind == "pickle"
    assert torch.equal(source.model.linear.weight, net.linear.weight)


def test_pickle_never_runs_without_trust(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    for zipped in (True, False):
        torch.save({"weight": torch.ones(2), "bomb": Bomb()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(LoadError, match="pickled code"):
            load_model(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()


def test_pickled_class_that_cannot_be_imported(tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(net, tmp_path / "model.pt")
    monkeypatch.delattr(sys.modules["mynet"], "Net")
    with pytest.raises(LoadError, match=r"Can't get attribute 'Net'.*Define it in a module"):
        load_model(tmp_path / "model.pt", trust_pickle=True)
    monkeypatch.delitem(sys.modules, "mynet")
    (tmp_path / "mynet.py").unlink()
    with pytest.raises(LoadError, match=r"needs the Python module 'mynet'.*PYTHONPATH=."):
        load_model(tmp_path / "model.pt", trust_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_file(tmp_path: Path, net: nn.Module, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    halve(path)
    for trust in (False, True):
        with pytest.raises(LoadError, match=r"model.pt was not written by torch.save, or is damaged or truncated"):
            load_model(path, arch="gpt2", trust_pickle=trust)


@pytest.mark.parametrize("content", [b"hello world, this is text", pickle.dumps({"a": 1}), b"PK\x05\x06" + b"\0" * 18])
def test_not_a_torch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(LoadError, match=r"model.pt was not written by torch.save"):
        load_model(tmp_path / "model.pt")


def test_torch_file_with_a_damaged_index(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[content.rindex(b"PK\x01\x02")] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(LoadError, match=r"model.pt was not written by torch.save, or is damaged"):
        load_model(tmp_path / "model.pt", arch="mynet:build")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(LoadError, match=r"model.pt is empty"):
        load_model(tmp_path / "model.pt")


def test_torchscript(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nn.Linear(2, 2), torch.ones(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(LoadError, match="TorchScript"):
        load_model(tmp_path / "model.pt", trust_pickle=True)


def test_torch_file_with_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(LoadError, match="contains an object of type list"):
        load_model(tmp_path / "model.pt")
