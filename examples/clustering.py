"""How long it takes to group the neurons of one layer into experts, by the layer's size.

    python examples/clustering.py

The rows are random, which is the worst case: k-means does not settle before its last iteration. Clustering uses one
core, and the time is that of the processor. Memory is the peak above what the process had before.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from tool_cost import peak_memory

from surgeon.moe.clustering import balanced_clusters

LAYERS = [(3072, 768, 96), (8192, 2048, 256), (14336, 4096, 128)]


def main() -> None:
    """Print the table."""
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
