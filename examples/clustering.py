"""How long it takes to group neurons into experts, by the size of a layer and of a model.

    python examples/clustering.py
    python examples/clustering.py 30M 124M 350M 1B  # moeify on llamas of these sizes

The rows are random, which is the worst case: k-means does not settle before its last iteration. Clustering uses one
core, and the time is that of the processor. Memory is the peak above what the process had before.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from size import SHAPES, llama
from tool_cost import peak_memory

import surgeon
from surgeon.moe.clustering import balanced_clusters
from surgeon.passes import Moeify

LAYERS = [(3072, 768, 96), (8192, 2048, 256), (14336, 4096, 128)]


def models(names: list[str]) -> None:
    """Print how long `moeify` takes for llamas with random weights: splitting and routers, without verification."""
    print("| parameters | of feed-forward layers | moeify, CPU-seconds | CPU-seconds per billion of these |")
    print("| --- | --- | --- | --- |")
    for name in names:
        model = llama(name)
        width, hidden, layers, _ = SHAPES[name]
        whole, split = sum(parameter.numel() for parameter in model.parameters()), 3 * width * hidden * layers
        graph = surgeon.trace(model, {"input_ids": torch.ones(2, 8, dtype=torch.long)}).eval()
        started = time.process_time()
        Moeify().apply(graph)
        seconds = time.process_time() - started
        print(
            f"| {whole / 1e6:,.0f} M | {split / 1e6:,.0f} M | {seconds:.0f} | {1e9 * seconds / split:.0f} |", flush=True
        )


def main() -> None:
    """Print the table."""
    if sys.argv[1:]:
        models(sys.argv[1:])
        return
    balanced_clusters(torch.randn(64, 8), 4, seed=0)  # imports
    print("| neurons | width | experts | seconds | memory over the rows' |")
    print("| --- | --- | --- | --- | --- |")
    for neurons, width, experts in LAYERS:
        torch.manual_seed(0)
        rows = F.normalize(torch.randn(neurons, width), dim=1)
        started = time.process_time()
        with peak_memory() as memory:
            balanced_clusters(rows, experts, seed=0)
        seconds = time.process_time() - started
        size = rows.numel() * rows.element_size()
        print(f"| {neurons:,} | {width:,} | {experts} | {seconds:.1f} | {memory.grown / size:.1f} × |", flush=True)


if __name__ == "__main__":
    main()
