"""Distillation: keep the outputs and the layer inputs of a graph close to those of its original model.

The divergence of the outputs, whatever they are, is in `surgeon.data.imitation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.imitation import relative_square
from surgeon.data.padding import real_tokens
from surgeon.errors import UsageError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.capture import Capture
from surgeon.graph.traced import shape_of
from surgeon.models.tasks import needs_labels
from surgeon.moe.site import find_moes
from surgeon.sites.search import find_ffns
from surgeon.tracing.trace import TraceInfo

log = logging.getLogger("surgeon")


class Teacher:
    """The model before the first pass, which a rewritten graph is trained to imitate."""

    def __init__(self, original: GraphModule, layers: tuple[str, ...] = ()) -> None:
        """Wrap the original model, which must be in evaluation mode.

        layers: names of the nodes whose values `layer_error` compares, see `layer_inputs`.
        """
        self._layers = layers
        self._model = Capture(original, layers, keep_output=True)

    def __call__(self, batch: Batch) -> tuple[object, dict[str, Tensor]]:
        """Return the model's output and the values of the layers by name, without gradients."""
        return call_reproducibly(self._model, batch.args, dict(batch.kwargs))  # type: ignore[no-any-return]

    def layer_error(self, batch: Batch, expected: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Return the squared error of the layers' inputs over real tokens, relative to their squared size, a scalar.

        It is the mean over layers, so every layer counts the same, whatever the size of its input. This is the
        hidden-state distillation of TinyBERT (arXiv 1909.10351) for equal widths.
        """
        errors = []
        for name in self._layers:
            want, got = real_tokens(batch, expected[name]).float(), real_tokens(batch, values[name]).float()
            errors.append(relative_square(got - want, want))
        return torch.stack(errors).mean()


def imitates(graph: GraphModule, data: Data) -> bool:
    """Whether training is for the outputs of the original model alone: the task says so, and no other loss is given."""
    task = data.task or class_task(graph)
    return data.loss is None and task is not None and not needs_labels(task)


def class_task(graph: GraphModule) -> str | None:
    """Return the task of the model's class; None if it does not tell."""
    info: TraceInfo | None = graph.meta.get("trace")
    return None if info is None else info.task


def layer_inputs(original: GraphModule, graph: GraphModule) -> tuple[str, ...]:
    """Return the names of the nodes that are inputs of layers in the graph and also exist in the original model.

    Layers are the feed-forward layers, replaced projections and experts. Inputs of the whole model are left out,
    because they cannot differ. Other inputs that the original model does not have are left out with a warning.

    Raises:
        UsageError: there is no such node.
    """
    known = {node.name: node for node in original.graph.nodes}
    inputs = {site.path: [call.x for call in site.calls] for site in find_ffns(graph)[0]}
    inputs |= {site.path: [node.args[0] for node in site.nodes] for site in find_moes(graph)}  # type: ignore[misc]
    found: dict[str, None] = {}
    missing = []
    for path, nodes in inputs.items():
        for node in nodes:
            if node.name not in known or not _same(node, known[node.name]):
                missing.append(path)
            elif node.op != "placeholder":
                found[node.name] = None
    if not found:
        raise UsageError(
            "distill_layers compares the inputs of layers before and after the passes, but no layer's input existed "
            "before the passes. Use distill, which compares the model's outputs."
        )
    if missing:
        log.warning(
            "distill_layers leaves out %s, because its input did not exist before the passes.",
            " and ".join(dict.fromkeys(missing)),
        )
    return tuple(found)


def _same(node: Node, other: Node) -> bool:
    """Whether two nodes with the same name are the same operation. A new node may reuse the name of an erased one."""
    return (node.op, node.target, shape_of(node)) == (other.op, other.target, shape_of(other))
