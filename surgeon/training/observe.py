"""Collect intermediate values of a graph on a few thousand tokens of real data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.data.batch import Batch, gathered_from
from surgeon.data.data import Data
from surgeon.data.losses import evaluating
from surgeon.data.padding import real_tokens, warn_of_masks
from surgeon.errors import DataError
from surgeon.graph.capture import Capture
from surgeon.progress import Progress, Tell
from surgeon.sites.ffn import FFN
from surgeon.training.penalty import Sparsity

Key = TypeVar("Key")

# Tokens on which sparsity is reported.
SPARSITY_TOKENS = 4096
# How many times as many tokens as wanted are run at most, for nodes that get few of them.
_LONGER = 4


def collect(
    graph: GraphModule,
    names: Iterable[str],
    data: Data,
    *,
    tokens: int,
    progress: Tell | None = None,
) -> dict[str, Tensor]:
    """Collect the values of inner nodes on the first batches of the training data, in evaluation mode, without padding.

    Args:
        names: names of nodes whose values are [..., d]. Nodes may have different numbers of tokens.
        tokens: the number of tokens to collect for every node. There are fewer if the data ends first, or for a node
            that gets few of them, such as a pooler's: the others are not run more than four times as long for it.

    Returns:
        The values by name, [N, d] with N at most `tokens`.

    Raises:
        DataError: the data holds no tokens.
    """
    names = list(dict.fromkeys(names))
    inner = Capture(graph, names)
    device = next((parameter.device for parameter in graph.parameters()), torch.device("cpu"))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    enough, most, done, warned = 0, 0, 0, False
    counts = dict.fromkeys(names, 0)
    with evaluating(inner):
        for item in data.train:
            whole = Batch.from_any(item)
            batch = whole.part().to(device)
            _, values = inner(*batch.args, **batch.kwargs)
            warned = warned or warn_of_masks(batch, [value.shape[:-1] for value in values.values()])
            for name in names:
                part = gathered_from(whole, real_tokens(batch, values[name]))
                if counts[name] < tokens:
                    found[name].append(part)
                counts[name] += len(part)
            enough, most = min(counts.values()), max(counts.values())
            done = min(max(enough, most // _LONGER), tokens)
            if progress is not None:
                progress(Progress("calibration", done, tokens))
            if enough >= tokens or most >= _LONGER * tokens:
                break
    if progress is not None and 0 < done < tokens:  # the data has no more
        progress(Progress("calibration", done, done))
    if not enough:
        raise DataError("The data holds no tokens: its batches have no rows, or nothing but padding.")
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def collect_calls(
    graph: GraphModule,
    names: Mapping[Key, Sequence[str]],
    data: Data,
    *,
    tokens: int,
    progress: Tell | None = None,
) -> dict[Key, Tensor]:
    """Collect the values of several nodes under one key, such as the inputs of a layer that is executed several times.

    Args:
        names: for every key, names of nodes whose values are [..., d]. Each node gives an equal part of the tokens.

    Returns:
        The values by key, [N, d] with N at most `tokens`.
    """
    values = collect(
        graph, (name for group in names.values() for name in group), data, tokens=tokens, progress=progress
    )
    found = {}
    for key, group in names.items():
        different = list(dict.fromkeys(group))
        found[key] = torch.cat([values[name][: max(1, tokens // len(different))] for name in different])
    return found


def pre_activations(graph: GraphModule, sites: Iterable[FFN], data: Data) -> dict[str, Tensor]:
    """Collect the outputs of the first linear of feed-forward layers, [N, h], by path, over all executions."""
    names = {site.path: [call.first[0].output.name for call in site.calls] for site in sites}
    return collect_calls(graph, names, data, tokens=SPARSITY_TOKENS)


def layer_sparsity(graph: GraphModule, sites: Iterable[FFN], data: Data) -> dict[str, Sparsity]:
    """Measure how sparse the activations of feed-forward layers are, by path, over all executions of a layer."""
    sites = list(sites)
    values = pre_activations(graph, sites, data)
    return {site.path: Sparsity.of(site.activations(graph, values[site.path])) for site in sites}
