"""A model with classes of its own for inputs and outputs: saved, and opened where they are not known."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from surgeon.dynamic.knobs import get_tau
from surgeon.errors import LoadError
from surgeon.jobs.open_model import open_model
from surgeon.passes import Lower, Moeify
from surgeon.surgery.artifact import load
from surgeon.surgery.pipeline import Pipeline
from tests.cli.harness import run_surgeon

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput


@dataclass
class Scores(ModelOutput):
    logits: torch.Tensor | None = None


@dataclass
class Batch:
    x: torch.Tensor


pytree.register_dataclass(Batch, serialized_type_name="own_classes.Batch")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x):
        return Scores(logits=self.down(torch.nn.functional.gelu(self.up(x))))


class OfBatches(Net):
    def forward(self, batch):
        return {"scores": super().forward(batch.x), "batch": batch}
"""


@pytest.fixture
def forget(write_module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A module with classes of its own, and a function that makes the process forget it."""
    write_module("own_classes", MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run() -> None:
        module = sys.modules.pop("own_classes", None)
        for name in ("Scores", "Batch") if module is not None else ():
            pytree._deregister_pytree_node(getattr(module, name))
        pytree.treespec_loads.cache_clear()  # it remembers the classes

    yield run
    run()


@pytest.fixture
def place(forget: Callable[[], None], tmp_path: Path) -> Path:
    """A directory with a saved surgery, and with an exported program whose inputs are of a class of its own."""
    own = importlib.import_module("own_classes")
    torch.manual_seed(0)
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(own.Net().eval(), inputs=(torch.randn(2, 8, 16),))
    program = torch.export.export(own.OfBatches().eval(), (own.Batch(torch.randn(2, 8, 16)),))
    saved = surgery.save(tmp_path / "saved")
    torch.export.save(program, tmp_path / "batches.pt2")
    forget()
    return saved


def test_unknown_classes(place: Path) -> None:
    wanted = (
        r"class own_classes\.Scores, which is not registered\. Import the module own_classes first, or name it: "
        r"surgeon\.load\(\.\.\., trust_modules=\('own_classes',\)\)"
    )
    for open_it in (lambda: load(place), lambda: open_model(str(place / "model.pt2"))):
        with pytest.raises(LoadError, match=wanted):
            open_it()
    with pytest.raises(LoadError, match=r"own_classes\.Batch"):
        open_model(str(place.with_name("batches.pt2")))
    assert "own_classes" not in sys.modules


def test_trusted_module(place: Path, forget: Callable[[], None]) -> None:
    output = load(place, trust_modules=("own_classes",))(torch.ones(3, 5, 16))
    assert type(output) is sys.modules["own_classes"].Scores
    assert output.logits.shape == (3, 5, 4)
    assert load(place)  # imported once, it stays known
    forget()
    opened = open_model(str(place.with_name("batches.pt2")), trust_modules=["own_classes"])
    assert type(opened.inputs[0][0]) is sys.modules["own_classes"].Batch


def test_a_module_that_registers_nothing(place: Path, write_module: Callable[[str, str], None]) -> None:
    write_module("own_classes", "")
    with pytest.raises(LoadError, match="own_classes is imported, but does not register it"):
        load(place, trust_modules=("own_classes",))
    sys.modules.pop("own_classes")


def test_commands_take_it(place: Path, forget: Callable[[], None]) -> None:
    refused = run_surgeon("inspect", str(place))
    assert (refused.code, "--trust-module own_classes" in refused.err) == (3, True)
    for command in (["inspect"], ["set", "--tau", "0.5"]):
        forget()
        done = run_surgeon(*command, str(place), "--trust-module", "own_classes")
        assert done.code == 0, done.err
    assert get_tau(load(place)) == {"up.moe": 0.5}


def test_a_module_that_cannot_be_trusted(place: Path) -> None:
    with pytest.raises(LoadError, match="The trusted module no_such: the Python module 'no_such' cannot be imported"):
        load(place, trust_modules=("no_such",))
