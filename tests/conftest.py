"""What all tests share: an offline, single-threaded process, traced models kept for the session, and golden files."""

from __future__ import annotations

import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.tracing.trace import trace
from tests import small_models

# Tracing makes many small objects that stay. To look through all of them as often as Python does takes long.
gc.set_threshold(100_000, 20, 100)
# What torch.export keeps of each op pays from some six layers on, and the models here have two. The examples of the
# documentation (test_docs) run with it, as users do.
torch._dynamo.config.fake_tensor_cache_enabled = False

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")
    parser.addoption("--zoo", action="store_true", help="run every architecture of the zoo (an hour on two cores)")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums are then added in the same order on every machine, and the models are too small for more.
    torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: compare the text with tests/golden/<name>.txt, or write it with --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {path.name}: run pytest --update-golden and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`write_module(name, text)`: a module in the working directory, a new one; after the test it is not imported."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


class Traces:
    """Models and their graphs by name, each traced once.

    A name is that of a Hugging Face family, the kind of a `Classifier`, or "stack:" and the kind of a `Stack`.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[nn.Module, Any, TracedGraph]] = {}

    def pair(self, name: str) -> tuple[nn.Module, Any, TracedGraph]:
        """The model, its inputs, and its graph, which share their parameters. All tests share them: change nothing."""
        if name not in self._made:
            if name in small_models.HUGGING_FACE:
                model, inputs = small_models.hugging_face(name)
            elif name.startswith("stack:"):
                model, inputs = small_models.stack(name.removeprefix("stack:")), small_models.vectors()
            else:
                model, inputs = small_models.classifier(name), small_models.tokens()
            self._made[name] = model, inputs, trace(model, inputs)
        return self._made[name]

    def __call__(self, name: str) -> TracedGraph:
        """A graph with parameters of its own, in evaluation mode."""
        graph = fork(self.pair(name)[2])
        own_parameters(graph)
        return graph.eval()

    def inputs(self, name: str) -> Any:
        """The keyword inputs that the model was traced with."""
        return {key: value.clone() for key, value in self.pair(name)[1].items()}


@pytest.fixture(scope="session")
def traces() -> Traces:
    """See `Traces`."""
    return Traces()


@pytest.fixture(scope="session")
def sharp() -> tuple[TracedGraph, list[Any]]:
    """A stack in which it matters which experts run: groups of neurons that listen to one input each.

    The graph and its data. All tests share them: change nothing.
    """
    model = small_models.stack("relu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            listens = torch.eye(small_models.WIDTH)[torch.arange(small_models.HIDDEN) // 4]
            block.ffn.fc1.weight.copy_(
                2 * listens + 0.05 * torch.randn(block.ffn.fc1.weight.shape, generator=generator)
            )
            block.ffn.fc1.bias.fill_(-1.0)
    data = [(small_models.vectors(16, 8, seed=number), torch.arange(16) % 3) for number in range(4)]
    return trace(model.eval(), small_models.vectors()), data
