"""Graphs as ONNX models, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(("rule", "lowered"), [("max", True), ("top_k", True), ("energy", False)])
def test_it_gives_what_the_graph_gives(rule: str, lowered: bool, tmp_path: Path) -> None:
    passes = [Moeify(expert_size=8, rule=rule), *([Lower()] if lowered else [])]
    check(surgeon.Pipeline(passes).run(stack(), inputs=vectors()).graph.eval(), tmp_path)


@pytest.mark.parametrize("lowered", [True, False])
@pytest.mark.parametrize("skipping", [SparsifyInputs, SparsifyNeurons])
def test_layers_mask_what_they_skip(skipping: Any, lowered: bool, tmp_path: Path) -> None:
    passes = [skipping(), *([Lower()] if lowered else [])]
    check(surgeon.Pipeline(passes).run(stack("gated"), inputs=vectors(), data=[vectors()]).graph.eval(), tmp_path)


def check(graph: surgeon.TracedGraph, tmp_path: Path) -> None:
    """Compare a graph with its ONNX model where it skips."""
    dense = graph(**vectors())
    surgeon.set_tau(graph, 0.4)
    assert not torch.allclose(graph(**vectors()), dense, rtol=1e-3, atol=1e-3)
    program = Program(graph, vectors())
    onnx.save(program, tmp_path / "model.onnx")
    session = onnx.Session(tmp_path / "model.onnx", threads=1)
    for _, inputs, expected in program.examples():
        for found, wanted in zip(session(inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
