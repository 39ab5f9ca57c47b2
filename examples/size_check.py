"""Time the check of sizes that every graph makes at every call, for the inputs of an encoder such as MiniLM.

    python examples/size_check.py

Graph and model are tiny, and called in turn: the whole call of a graph, and the check alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertModel

import surgeon
from surgeon.graph.size_check import check_sizes

ROUNDS, CALLS = 15, 2000


def microseconds(call: Callable[[], object], calls: int) -> float:
    """The median time of a call, in microseconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print the times."""
    torch.set_num_threads(1)
    config = BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536, num_attention_heads=12)
    model = BertModel(config).eval()
    ids = torch.randint(5, 30000, (1, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    graph = surgeon.trace(model, inputs).eval()
    sizes, flat = graph.meta["trace"].sizes, tuple(inputs.values())
    with torch.inference_mode():
        whole = microseconds(lambda: graph(**inputs), 5)
    check = microseconds(lambda: check_sizes(sizes, *flat), CALLS)
    empty = microseconds(lambda: None, CALLS)
    print(sizes)
    print(f"one call of the graph with 16 tokens: {whole:.0f} µs")
    print(f"the check of its sizes: {check - empty:.2f} µs, {(check - empty) / whole:.3%} of it")


if __name__ == "__main__":
    main()
