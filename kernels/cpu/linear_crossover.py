"""Measure from how many rows on the dense product of a linear layer is faster on this machine, and store the result.

For few tokens `surgeon::sparse_linear` reads the rows that some token keeps, and the time grows with their number; the
dense product's does not. So both take equal time at about the share of the rows that is dense time / time with all of
them.
Several layers run in turn, so that their weights come from memory, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from surgeon.kernels.cpu.crossover import dense_over_ours, measured_once

TOKENS = (1, 2, 4, 8, 16)
"""As in cpu/linear/sparse_linear.cpp. More go through the dense product in any case."""
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}

_WIDTH, _LAYERS = 768, 8
_FILE = "linear_crossover.json"


def load(directory: Path) -> None:
    """Give the kernels the results that were measured on this machine. Measure them first if necessary."""
    for name, tokens, share in measured_once(directory / _FILE, measure, _is_share):
        torch.ops.surgeon.cpu_set_linear_crossover(WEIGHTS[name], tokens, share)


def measure() -> Iterator[tuple[str, int, float]]:
    """Yield (dtype of the weights, tokens, share of the rows from which on dense is faster)."""
    for name in WEIGHTS:
        for tokens in TOKENS:
            yield name, tokens, min(1.0, dense_over_ours(_layers(name, tokens), 1.0))


def _is_share(row: Any) -> bool:
    match row:
        case [str(name), int(tokens), int() | float() as share]:
            return name in WEIGHTS and tokens in TOKENS and 0.0 <= share <= 1.0
    return False


def _layers(name: str, tokens: int) -> Callable[[], None]:
    """A call of several layers; every token keeps all inputs."""
    dtype = WEIGHTS[name]
    # Not random: a program that calls this must find its random state as it left it.
    weights = torch.ones(_LAYERS, _WIDTH, _WIDTH, dtype=dtype)
    w_scale = torch.ones(_WIDTH) if dtype == torch.int8 else None
    x = torch.ones(tokens, _WIDTH, dtype=torch.float32 if dtype == torch.int8 else dtype)
    levels, tau = torch.tensor([0.0, 1.0]), torch.zeros(())

    def call() -> None:
        for weight in weights:
            torch.ops.surgeon.cpu_sparse_linear(x, weight, None, None, None, levels, tau, w_scale)

    return call
