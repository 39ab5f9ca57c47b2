"""The shelf that all command-line tests share, and a place of its own for each."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.progress import ShowProgress
from surgeon.tracing.trace import trace

from .harness import NET, Run, run_surgeon
from .shelf import NETS, write_bert


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with models, data and saved surgeries that no test changes."""
    place = tmp_path_factory.mktemp("shelf")
    (place / "nets.py").write_text(NETS)
    write_bert(place)
    sys.path.insert(0, str(place))
    try:
        with contextlib.chdir(place):
            assert run_surgeon("apply", "--passes", "moeify", *NET, "-o", "masked").code == 0
            passes = "swap-activation,sparsify,moeify,lower"
            result = run_surgeon("apply", "--passes", passes, "--set", "moeify.experts=4", "bert", "-o", "bert-moe")
        assert result.code == 0, result.err
        (place / "apply.txt").write_text(result.out)
        yield place
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("nets", None)


@pytest.fixture
def run(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty directory from which the shelf's models can be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "bert-moe", "masked", "reviews.csv"):
        (tmp_path / name).symlink_to(shelf / name)
    return run_surgeon


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the real one takes longer than everything else here."""
    monkeypatch.setattr("surgeon.bench.timing.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine.cache_size", lambda: 1024)
    monkeypatch.setattr("surgeon.bench.machine._SIDE", {"cpu": 32})
    monkeypatch.setattr("surgeon.bench.machine._BUFFER", {"cpu": 1 << 16})


_traced: dict[str, TracedGraph] = {}


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Commands trace a model that was traced before, with the same weights and inputs, by copying its graph.

    For files in which many commands open the shelf's models and no test is about how they are traced.
    """

    def copied(model: nn.Module, inputs: Any, *, progress: ShowProgress = None) -> TracedGraph:
        key = hashlib.sha256(f"{type(model)} {model} {getattr(model, 'config', None)}".encode())
        for place, leaf in pytree.tree_leaves_with_path((model.state_dict(), inputs)):
            told = f"{place} {leaf.shape} {leaf.dtype}" if isinstance(leaf, Tensor) else f"{place} {leaf}"
            key.update(told.encode())
            if isinstance(leaf, Tensor):
                key.update(leaf.flatten().contiguous().view(torch.uint8).numpy().tobytes())
        if key.hexdigest() not in _traced:
            _traced[key.hexdigest()] = trace(model, inputs, progress=progress)
        graph = fork(_traced[key.hexdigest()])
        own_parameters(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgeon.jobs.open_model.trace", copied)
        yield
