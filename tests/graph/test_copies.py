"""Copies and pickles of a graph are what it is; hooks where nothing runs warn."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import SizeError
from surgeon.graph.traced import TracedGraph, module_path
from surgeon.passes import Lower, Moeify
from surgeon.tracing.quiet import quiet
from tests.small_models import hugging_face, tokens


def through_torch(graph: TracedGraph) -> Any:
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[TracedGraph], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "torch.save": through_torch,
}


@pytest.fixture(scope="module", params=["dense", "experts", "lowered"])
def graph(request: pytest.FixtureRequest) -> TracedGraph:
    """A GPT-2, whose input and output embeddings are tied."""
    model, inputs = hugging_face("gpt2")
    passes: list[Any] = [Moeify(experts=4), Lower()][: ["dense", "experts", "lowered"].index(request.param)]
    if not passes:
        return surgeon.trace(model, inputs).eval()
    made = surgeon.Pipeline(passes).run(model, inputs=inputs).graph
    surgeon.set_tau(made, {"*.0.*": 0.25, "*": 0.5})
    surgeon.set_rule(made, "cumulative")
    return made.eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_what_the_graph_is(graph: TracedGraph, way: str) -> None:
    with quiet():
        made = WAYS[way](graph)
    ids = tokens()["input_ids"]
    assert isinstance(made, TracedGraph)
    assert torch.equal(made(ids).logits, graph(ids).logits)
    assert (made.training, made.meta["trace"]) == (False, graph.meta["trace"])
    assert made.meta.keys() == graph.meta.keys()
    assert [node.name for node in made.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert list(map(module_path, made.graph.nodes)) == list(map(module_path, graph.graph.nodes))
    values = [node.meta.get("val") for node in made.graph.nodes], [node.meta.get("val") for node in graph.graph.nodes]
    assert [str(getattr(value, "shape", value)) for value in values[0]] == [
        str(getattr(value, "shape", value)) for value in values[1]
    ]
    assert made.graph is not graph.graph
    shared = {parameter.data_ptr() for parameter in made.parameters()} & {p.data_ptr() for p in graph.parameters()}
    assert bool(shared) is (way == "copy")
    assert len(list(made.parameters())) == len(list(graph.parameters()))  # tied ones are one
    with pytest.raises(SizeError, match="input_ids is of dtype"):
        made(ids.float())
    if surgeon.find_moes(graph):
        assert surgeon.get_tau(made) == surgeon.get_tau(graph)
        assert surgeon.get_rule(made) == surgeon.get_rule(graph)
        if way != "copy":
            before = surgeon.get_tau(graph)
            surgeon.set_tau(made, 0.0)
            assert surgeon.get_tau(graph) == before


@pytest.mark.parametrize("way", WAYS)
def test_passes_go_on_from_a_copy(traces: Any, way: str, tmp_path: Path) -> None:
    with quiet():
        made = WAYS[way](traces("bert"))
    inputs = traces.inputs("bert")
    surgery = surgeon.Pipeline([Moeify(experts=4), Lower()]).run(made, inputs=inputs)
    assert [site.form for site in surgeon.find_moes(surgery.graph)] == ["dynamic", "dynamic"]
    loaded = surgeon.load(surgery.save(tmp_path / "saved"))
    assert torch.allclose(loaded(**inputs).logits, traces("bert")(**inputs).logits, atol=1e-5)


def test_a_training_graph_stays_in_training(traces: Any) -> None:
    graph = traces("gelu").train()
    for way in WAYS.values():
        with quiet():
            made = way(graph)
        assert made.training
        assert not torch.equal(made(**tokens()), made(**tokens()))
        assert torch.equal(made.eval()(**tokens()), made(**tokens()))


def test_a_pickle_is_read_in_another_process(graph: TracedGraph, tmp_path: Path) -> None:
    if not any(site.form == "dynamic" for site in surgeon.find_moes(graph)):
        return  # the operators are what another process has to find
    ids = tokens()["input_ids"]
    with quiet():
        (tmp_path / "graph").write_bytes(pickle.dumps((graph, ids, graph(ids).logits)))
    code = (
        "import pickle, sys, torch\ngraph, ids, expected = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "torch.testing.assert_close(graph(ids).logits, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "graph"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def count(module: nn.Module, *args: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1  # type: ignore[assignment, operator]


def test_hooks_of_the_graph_itself_go_along(traces: Any) -> None:
    graph = traces("gelu")
    graph.register_forward_hook(count)
    for way in WAYS.values():
        with quiet():
            made = way(graph)
        made(**tokens())
        assert made.calls == 1


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_where_nothing_runs_warns(traces: Any, kind: str) -> None:
    graph = traces("gelu")
    path = "blocks.0.ffn.fc1"
    with pytest.warns(UserWarning, match=f"'{path}' only holds parameters of a graph and is never called") as seen:
        getattr(graph.get_submodule(path), f"register_{kind}_hook")(count)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(graph, f"register_{kind}_hook")(count)


def test_a_hook_on_experts_runs_until_they_are_lowered(traces: Any) -> None:
    made = surgeon.Pipeline([Moeify(experts=4)]).run(traces("gelu"), inputs=tokens()).graph
    (path, *_) = surgeon.get_tau(made)
    experts = made.get_submodule(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts.register_forward_hook(count)
    made(**tokens())
    assert experts.calls == 1
    lowered = surgeon.Pipeline([Lower()]).run(made, inputs=tokens()).graph
    with pytest.warns(UserWarning, match="never called"):
        lowered.get_submodule(path).register_forward_hook(count)
