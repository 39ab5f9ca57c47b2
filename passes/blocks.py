"""The blocks of a model, for passes that work between them."""

from __future__ import annotations

from torch.fx import GraphModule

from surgeon.exits.blocks import Layer
from surgeon.moe.site import find_moes
from surgeon.sites.search import find_ffns


def block_layers(graph: GraphModule) -> list[Layer]:
    """Return every execution of the feed-forward layers, with experts or without, in topological order."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    layers = [
        Layer(site.path, call.output, site.parameters(graph), site.multiply_adds)
        for site in find_ffns(graph)[0]
        for call in site.calls
    ]
    for moe in find_moes(graph):
        count = sum(parameter.numel() for parameter in graph.get_submodule(moe.path).parameters())
        layers += [Layer(moe.path, node, count, moe.multiply_adds) for node in moe.nodes]
    return sorted(layers, key=lambda layer: order[layer.output])


def stack_of(path: str) -> str:
    """Return the module that holds the blocks: `encoder.layer` of `encoder.layer.0.output`."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:number])
