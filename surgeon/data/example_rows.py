"""Take example inputs for tracing from the data: two rows of its first batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.data.batch import Batch
from surgeon.data.data import Data


def first_batch(data: Data) -> Batch:
    """Return the first batch of the training data. What is read later does not change by it (`read_ahead`)."""
    return read_ahead(data, 1)[0]


def read_ahead(data: Data, most: int, most_bytes: float = math.inf) -> list[Batch]:
    """Return the first batches of the training data, at least one. What is read later does not change by it.

    Orders that a loader draws from torch's global random state or from a generator of its own are drawn again. A loader
    that counts its epochs counts this one not.

    Args:
        most: the most batches. most_bytes: no batch is read after as many bytes of inputs.
    """
    source = getattr(data.train, "source", data.train)
    sampler, batches = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    parts: tuple[Any, ...] = (source, sampler, getattr(batches, "sampler", None))
    generators = [part.generator for part in parts if isinstance(getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    found: list[Batch] = []
    with torch.random.fork_rng(devices=[]):
        for item in copy.copy(source):
            found.append(Batch.from_any(item))
            if len(found) >= most or sum(map(_bytes, found)) >= most_bytes:
                break
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return found


def _bytes(batch: Batch) -> int:
    return sum(value.nbytes for value in (*batch.args, *batch.kwargs.values()))


def example_rows(data: Data) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs: two rows of the first batch, with the most and the least padding.

    A batch of one row is taken as it is.
    """
    batch = first_batch(data)
    size, chosen = batch.size, [0, 1]
    mask = batch.kwargs.get("attention_mask")
    if size > 2 and isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.sum(1)
        longest, shortest = int(real.argmax()), int(real.argmin())
        chosen = [longest, shortest] if longest != shortest else chosen

    def rows(leaf: Any) -> Any:
        # What is no batch, such as a mask for all samples, stays whole.
        return leaf[chosen[:size]].clone() if isinstance(leaf, Tensor) and leaf.shape[:1] == (size,) else leaf

    args, kwargs = pytree.tree_map(rows, (batch.args, dict(batch.kwargs)))
    return args, kwargs
