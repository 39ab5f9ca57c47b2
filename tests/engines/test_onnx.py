"""Graphs as ONNX models, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.engines import onnx
from surgeon.engines.program import Program
from surgeon.passes import Lower, Moeify, SparsifyInputs, SparsifyNeurons
from tests.small_models import stack, vectors

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, on the way to ONNX


@pytest.mark.parametrize(("rules", "lowered"), [(("max", "top_k"), True), (("energy", "cumulative"), False)])
def test_it_gives_what_the_graph_gives(rules: tuple[str, str], lowered: bool, tmp_path: Path) -> None:
    passes = [Moeify(expert_size=8), *([Lower()] if lowered else [])]
    graph = surgeon.Pipeline(passes).run(stack(), inputs=vectors()).graph.eval()
    surgeon.set_rule(graph, {f"blocks.{layer}.*": rule for layer, rule in enumerate(rules)})
    check(graph, tmp_path)


@pytest.mark.parametrize("lowered", [True, False])
def test_layers_mask_what_they_skip(lowered: bool, tmp_path: Path) -> None:
    """The first layer skips neurons, the second inputs."""
    passes = [
        SparsifyNeurons(only=("blocks.0.*",)), SparsifyInputs(only=("blocks.1.*",)), *([Lower()] if lowered else []),
    ]  # fmt: skip
    graph = surgeon.Pipeline(passes).run(stack("gated"), inputs=vectors(), data=[vectors()]).graph.eval()
    assert len(surgeon.get_tau(graph)) == 1 + 4
    check(graph, tmp_path)


def check(graph: surgeon.TracedGraph, tmp_path: Path) -> None:
    """Compare a graph with its ONNX model where each of its layers skips."""
    surgeon.set_tau(graph, 0.4)
    skipping = graph(**vectors())
    for layer in ("blocks.0.*", "blocks.1.*"):
        surgeon.set_tau(graph, 0.0, layer)
        assert not torch.allclose(graph(**vectors()), skipping, rtol=1e-3, atol=1e-3)
        surgeon.set_tau(graph, 0.4, layer)
    program = Program(graph, vectors())
    onnx.save(program, tmp_path / "model.onnx")
    session = onnx.Session(tmp_path / "model.onnx", threads=1)
    for _, inputs, expected in program.examples():
        for found, wanted in zip(session(inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
