"""Commands on a language model whose gated layers skip neurons."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import surgeon

from .harness import Run, run_surgeon

LAYER = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def made(shelf: Path) -> Path:
    with contextlib.chdir(shelf):
        tokenizer = AutoTokenizer.from_pretrained("bert")
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32, use_cache=False, bos_token_id=0, eos_token_id=0,
            )
        ).save_pretrained("llama")  # fmt: skip
        tokenizer.save_pretrained("llama")
        Path("text.txt").write_text("the film was good and the end was bad\n" * 60)
        words = ("--data", "text.txt", "llama", "-o", "neurons")
        result = run_surgeon("apply", "--passes", "sparsify-neurons,lower", *words)
        assert result.code == 0, result.err
        assert "16→32 neurons→16 silu" in result.out
    return shelf


def test_they_are_shown_set_measured_and_exported(run: Run, made: Path) -> None:
    data = ("--data", str(made / "text.txt"))
    result = run("-q", "tune", str(made / "neurons"), *data, "--budget", "0.9", "--samples", "8", "-o", "mine")
    assert result.code == 0, result.err
    assert any(surgeon.get_tau(surgeon.load("mine")).values())
    result = run("set", "mine", "--tau", "0.5")
    assert result.code == 0, result.err
    result = run("-q", "inspect", "mine")
    assert "2 neuron-skipping layers" in result.out
    assert "16→32→16" in result.out
    found = run("-q", "inspect", "mine", "--output", "json").json["skipping"]
    assert [(one["path"], one["shape"], one["form"]) for one in found] == [
        (f"model.layers.{i}.mlp.neurons", [16, 32, 16], "dynamic") for i in (0, 1)
    ]
    assert 0 < found[0]["executed"] < 1
    sites = run("-q", "diff", str(made / "llama"), "mine", "--output", "json").json["sites"][LAYER]
    assert sites[0]["multiply_adds"] == sites[1]["multiply_adds"] == 3 * 16 * 32
    assert sites[1]["what"] == "16→32 neurons→16 silu"
    result = run("-q", "sweep", "mine", *data, "--tau", "0.5", "--output", "json")
    assert result.code == 0, result.err
    point = next(point for point in result.json["points"] if point["tau"] == 0.5)
    assert point["layers"] == pytest.approx((1 + 2 * point["executed"]) / 3)
    result = run("-q", "load", "mine", *data)
    assert "neurons that ran" in result.out
    result = run("-q", "export", "mine", "-o", "hf", "--output", "json")
    assert result.code == 0, result.err
    assert result.json["layers"][LAYER]["what"] == "16→32 neurons→16 silu"
    assert result.json["layers"][LAYER]["facts"]["hidden"] == 32
    card = Path("hf/README.md").read_text()
    assert "# LlamaForCausalLM that skips neurons" in card
    assert "lets 2 of its gated layers skip" in card
