"""A small gated language model on Python's standard library: what skipping neurons or inputs costs, without training.

python examples/frontier/neurons.py quality WORK
python examples/frontier/neurons.py speed

`quality` trains a llama once, which it keeps in WORK, and prints for several passes, applied to its feed-forward layers
alone, the multiply-adds of these layers over those of the dense ones, the KL divergence from the dense model, and what
the loss rises by, on held-out files. `speed` times one gated layer on one thread.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from language import tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.inputs.calibration import neuron_levels
from surgeon.kernels.sparse_neurons import sparse_neurons
from surgeon.measure.meter import ExpertMeter
from surgeon.measure.sweep import layers_share
from surgeon.passes import Lower, Pass, SparsifyInputs, SparsifyNeurons

STEPS, BATCH, LR = 700, 16, 2e-3
HELD, CALIBRATION = 96, 32  # rows of 128 tokens
LINEARS = tuple(f"*.mlp.{name}_proj" for name in ("gate", "up", "down"))
INPUT_TAUS, NEURON_TAUS = (1 / 6, 1 / 3, 0.5, 0.6), (0.25, 0.5, 0.75, 0.9)
CASES: dict[str, tuple[Pass[Any], tuple[float, ...]]] = {
    "neurons, as CATS": (SparsifyNeurons(criterion="magnitude", centre=False), NEURON_TAUS),
    "neurons, weighted": (SparsifyNeurons(centre=False), NEURON_TAUS),
    "neurons, weighted with centres": (SparsifyNeurons(), NEURON_TAUS),
    "inputs, as TEAL": (SparsifyInputs(criterion="magnitude", centre=False, only=LINEARS), INPUT_TAUS),
    "inputs, weighted with centres": (SparsifyInputs(only=LINEARS), INPUT_TAUS),
}


def trained(work: Path) -> Any:
    """The dense model, trained once."""
    if not (work / "config.json").exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=128, use_cache=False, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95))
        generator, rows = torch.Generator().manual_seed(0), tokens()[0]
        for step in range(STEPS):
            rate = LR * min(1, (step + 1) / 30) * (0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.02)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.save_pretrained(work)
    return LlamaForCausalLM.from_pretrained(work).eval()


def quality(work: Path) -> None:
    """Print a line for each pass and tau."""
    model, (train, held) = trained(work), tokens()
    batches = [{"input_ids": rows} for rows in held[:HELD].split(BATCH)]
    data = surgeon.Data([{"input_ids": rows} for rows in train[:CALIBRATION].split(BATCH)], task="causal-lm")
    targets = held[:HELD, 1:].reshape(-1)

    def answers(call: Callable[[dict[str, Tensor]], Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([call(batch).logits for batch in batches]).float().log_softmax(-1)

    def loss(found: Tensor) -> float:
        return float(F.nll_loss(found[:, :-1].flatten(0, 1), targets))

    dense = answers(lambda batch: model(**batch))
    print(f"dense: loss {loss(dense):.4f}")
    for name, (skipping, taus) in CASES.items():
        graph = surgeon.Pipeline([skipping, Lower()]).run(model, inputs=batches[0], data=data).graph.eval()
        for tau in taus:
            surgeon.set_tau(graph, tau)
            meter = ExpertMeter(graph)
            found = answers(lambda batch, meter=meter: meter.call((), batch))
            kl = float((dense.exp() * (dense - found)).sum(-1).mean())
            print(
                f"{name}: tau {tau:.2f}, multiply-adds {layers_share(meter.layers):.1%}, KL {kl:.4f}, "
                f"loss {loss(found) - loss(dense):+.4f}"
            )


def speed() -> None:
    """Print how many times as fast as the dense layer `surgeon::sparse_neurons` is, with weights from memory."""
    torch.set_num_threads(1)
    for d, hidden, layers in ((1024, 2816, 8), (4096, 11008, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            weights = [[(torch.randn(hidden, d) * d**-0.5).to(dtype) for _ in range(3)] for _ in range(layers)]
            downs = [down.t().contiguous() for _, _, down in weights]
            for count in (1, 2, 4, 8, 16):
                taken = _timed(weights, downs, torch.randn(count, d).to(dtype))
                dense = taken.pop(None)
                gains = ", ".join(f"{share:.0%} {dense / seconds:.2f}" for share, seconds in taken.items())
                milliseconds = 1000 * dense / layers
                print(f"{d}→{hidden}, {dtype}, {count} tokens: dense {milliseconds:.2f} ms; skipped {gains}")


def _timed(weights: list[list[Tensor]], downs: list[Tensor], x: Tensor) -> dict[float | None, float]:
    """CPU seconds of all layers by the share of the neurons that a token skips; None is the dense layer."""
    levels = neuron_levels(F.silu(F.linear(x, weights[0][0])), None, centred=False)
    tau = torch.zeros(())

    def dense() -> None:
        for (gate, up, _), down in zip(weights, downs, strict=True):
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def ours() -> None:
        for gate, up, down in weights:
            sparse_neurons(x, gate, None, up, None, down, None, None, None, levels, tau, "silu")

    taken: dict[float | None, list[float]] = {None: [], 0.0: [], 0.5: [], 0.75: [], 0.9: []}
    with torch.inference_mode():
        for _ in range(8):
            for share, seconds in taken.items():
                tau.fill_(share or 0.0)
                started = time.thread_time()
                (dense if share is None else ours)()
                seconds.append(time.thread_time() - started)
    return {share: statistics.median(seconds[1:]) for share, seconds in taken.items()}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["quality", work]:
            quality(Path(work))
        case ["speed"]:
            speed()
        case _:
            sys.exit(__doc__)
