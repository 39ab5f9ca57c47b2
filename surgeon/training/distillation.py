"""What a graph should keep of the model it was made from: its answers, and what its layers are given."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.data.batch import Batch
from surgeon.data.losses import logits_of
from surgeon.data.padding import real_tokens
from surgeon.errors import UsageError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.capture import Capture
from surgeon.graph.traced import shape_of
from surgeon.moe.site import find_moes
from surgeon.sites.search import find_ffns

log = logging.getLogger("surgeon")


class Teacher:
    """The model before the first pass, beside which another graph of it is trained."""

    def __init__(self, original: GraphModule, layers: tuple[str, ...] = ()) -> None:
        """Take the model in evaluation mode.

        layers: names of the nodes whose values `layer_error` compares, see `layer_inputs`.
        """
        self._layers = layers
        self._model = Capture(original, layers, keep_output=True)

    def __call__(self, batch: Batch) -> tuple[object, dict[str, Tensor]]:
        """The model's output, and the values of the layers by name, without gradients."""
        return call_reproducibly(self._model, batch.args, dict(batch.kwargs))  # type: ignore[no-any-return]

    def layer_error(self, batch: Batch, expected: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Squared error of the layers' inputs over real tokens, relative to their square; mean over layers, a scalar.

        Every layer counts alike, whatever the size of its input (the hidden-state distillation of TinyBERT, arXiv
        1909.10351, with widths that agree).
        """
        errors = []
        for name in self._layers:
            want, got = real_tokens(batch, expected[name]).float(), real_tokens(batch, values[name]).float()
            errors.append((got - want).square().sum() / want.square().sum().clamp_min(1e-12))
        return torch.stack(errors).mean()


def divergence(expected: object, outputs: object, batch: Batch) -> Tensor:
    """KL(expected ‖ outputs) of the distributions that logits stand for, in nats; mean over samples or real tokens."""
    want, got = logits_of(expected), logits_of(outputs)
    if got.dim() > 2:
        want, got = real_tokens(batch, want), real_tokens(batch, got)
    return F.kl_div(got.float().log_softmax(-1), want.float().log_softmax(-1), log_target=True, reduction="batchmean")


def layer_inputs(original: GraphModule, graph: GraphModule) -> tuple[str, ...]:
    """Names of the nodes that are a layer's input in the graph, and are there in the model it was made from too.

    Layers are the feed-forward layers, replaced projections and experts. An input of the whole model is left out, as it
    cannot differ; any other that was not there before is left out with a warning.

    Raises:
        UsageError: there is none.
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
            "distill_layers compares the inputs of layers with those before the passes, and there is no layer whose "
            "input was computed there as well. Use distill, which compares the model's answers."
        )
    if missing:
        log.warning(
            "distill_layers leaves out %s: what goes into it was not there before the passes.",
            " and ".join(dict.fromkeys(missing)),
        )
    return tuple(found)


def _same(node: Node, other: Node) -> bool:
    """Whether two nodes of one name are the same step, and not one that was named after another was erased."""
    return (node.op, node.target, shape_of(node)) == (other.op, other.target, shape_of(other))
