"""Put a residual stream that `rotate` turned into a model of its class.

That needs norms that are RMSNorms: with a gain of one they commute with the basis. A LayerNorm takes the mean of all
channels away, which no other basis has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError, some
from surgeon.grafting.placement import copy_of
from surgeon.graph.traced import TracedGraph, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.passes.report import PassReport
from surgeon.sites.norms import Norm
from surgeon.sites.stream import Stream
from surgeon.sites.stream_search import find_streams
from surgeon.sites.values import find_value_heads

# How far a gain may be from the weight that it is made of, in float64.
_CLOSE = 1e-6


def turned_streams(sketched: TracedGraph, reports: Sequence[PassReport]) -> list[Stream]:
    """Return the streams that were turned, as the dense model has them.

    Raises:
        UsageError: the model has no place for the turned weights.
    """
    rotated = [change.path for report in reports if report.name == "rotate" for change in report.sites]
    if not rotated:
        return []
    values = {site.path for site in find_value_heads(sketched)[0]}
    paths = [path for path in dict.fromkeys(rotated) if path not in values]
    sites = {site.path: site for site in find_streams(sketched)[0]}
    found = [sites[path] for path in paths if path in sites]
    fit = all(not site.centred and not any(writer.scaled for writer in site.writers) for site in found)
    if len(found) < len(paths) or not fit:
        raise UsageError(
            f"rotate turned the residual stream ({some(paths)}), for which the model has no place: only a model whose "
            "norms are RMSNorms has one.",
            python=f"Use the graph itself, or Rotate(skip={paths}), which turns the values of attention alone.",
            command="Use the graph itself (surgeon export --to openvino or onnx), or run rotate with --set "
            f"rotate.skip={','.join(paths)}, which turns the values of attention alone.",
        )
    return found


@torch.no_grad()
def plain_norms(sketched: TracedGraph, streams: Sequence[Stream]) -> dict[str, nn.Parameter]:
    """Return the weights with which the norms of turned streams have a gain of one, by their names in the model.

    Raises:
        UsageError: a gain is neither a weight nor one more than it.
    """
    found = {}
    for norm in dict.fromkeys(norm for site in streams for norm in site.norms):
        for node in {source for constant in norm.constants for source in walk_sources(constant)}:
            weight = tensor_of(sketched, node) if node.op == "get_attr" else None
            if isinstance(weight, nn.Parameter):
                found[str(node.target)] = nn.Parameter(_plain(norm, weight), requires_grad=weight.requires_grad)
    return found


def _plain(norm: Norm, weight: Tensor) -> Tensor:
    if norm.gain is None:
        return weight.clone()
    for value in (1.0, 0.0):
        if bool((norm.gain - weight.double().cpu() - (1.0 - value)).abs().max() <= _CLOSE * norm.gain.abs().max()):
            return torch.full_like(weight, value)
    raise UsageError(
        f"rotate made the norm {norm.path} plain, but how its gain comes from its weight is not known, so that the "
        "model cannot have it. Use the graph itself."
    )


def untied(model: nn.Module, graph: TracedGraph) -> nn.Module | None:
    """Return a copy of the model, which shares its tensors, without the ties that the graph no longer has.

    Returns:
        None if there is none to undo.
    """
    of_graph = dict(graph.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    apart = []
    for name, tensor in model.named_parameters(remove_duplicate=False):
        other, owner = first.setdefault(id(tensor), name), name.rpartition(".")[0]
        if other == name or other not in of_graph:
            continue
        # A pass may have made another layer of the one that had the weight.
        converted = name not in of_graph and any(one.startswith(f"{owner}.") for one in of_graph)
        if converted or of_graph.get(name, of_graph[other]) is not of_graph[other]:
            apart.append(name)
    if not apart:
        return None
    made = copy_of(model)
    for name in apart:
        owner, _, field = name.rpartition(".")
        tied = model.get_parameter(name)
        own = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
        setattr(made.get_submodule(owner), field, own)
    config: Any = getattr(made, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    return made
