"""Distillation: keep the outputs and the layer inputs of a graph close to those of its original model.

The divergence of the outputs, whatever they are, is in `surgeon.data.imitation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.imitation import answer, made_for, relative_square
from surgeon.data.losses import evaluating
from surgeon.data.padding import real_tokens
from surgeon.errors import UsageError, first_line
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.capture import Capture
from surgeon.graph.traced import shape_of
from surgeon.models.tasks import needs_labels
from surgeon.moe.site import find_moes
from surgeon.sites.search import find_ffns
from surgeon.tracing.trace import class_task

log = logging.getLogger("surgeon")

OTHER_BASIS = "other_basis"
"""The key in the original model's metadata of a stream that `rotate` turned in the graph and could not turn there."""


class Teacher:
    """What a rewritten graph is trained to imitate: the model before the first pass, or another model's outputs."""

    def __init__(self, original: GraphModule, layers: tuple[str, ...] = (), other: nn.Module | None = None) -> None:
        """Wrap the original model, which must be in evaluation mode.

        layers: names of the nodes whose values `layer_error` compares, see `layer_inputs`. other: gives the outputs in
        place of the original model. It is run in evaluation mode.
        """
        self._layers, self._other = layers, other
        self._model = Capture(original, layers, keep_output=other is None) if layers or other is None else None

    def __call__(self, batch: Batch) -> tuple[object, dict[str, Tensor]]:
        """Return the output and the values of the original model's layers by name, without gradients."""
        outputs: object = None
        values: dict[str, Tensor] = {}
        if self._model is not None:
            outputs, values = call_reproducibly(self._model, batch.args, dict(batch.kwargs))
        if self._other is not None:
            with evaluating(self._other):
                outputs = call_reproducibly(self._other, batch.args, dict(batch.kwargs))
        return outputs, values

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


def check_teacher(teacher: nn.Module, original: GraphModule, inputs: object, task: str | None) -> None:
    """Refuse a teacher whose outputs are not to be compared with those of the model.

    Args:
        inputs: example inputs of the model, with which both are called.
        task: of the data, None if unknown.

    Raises:
        UsageError: the teacher cannot be called with them, its outputs have other shapes or are not finite, or its
            classes have other names.
    """
    args, kwargs = as_args_kwargs(inputs)
    outputs_of = made_for(task, class_task(original))
    wanted = answer(call_reproducibly(original, args, kwargs), outputs_of)
    try:
        with evaluating(teacher):
            outputs = call_reproducibly(teacher, args, kwargs)
    except Exception as error:  # a model may raise anything
        names = ", ".join(kwargs) or "positional ones"
        raise UsageError(
            f"The teacher cannot be called with the model's inputs ({names}): {first_line(error)}. It must take the "
            "same inputs as the model, on the same device."
        ) from error
    found = answer(outputs, outputs_of)
    want, got = (", ".join(str(list(part.values.shape)) for part in parts) for parts in (wanted, found))
    if want != got or [part.logits for part in wanted] != [part.logits for part in found]:
        raise UsageError(
            f"The teacher answers {got} on the example inputs, and the model {want}. They must have the same classes "
            "or the same vocabulary, in tensors of the same names."
        )
    if not all(bool(torch.isfinite(part.values).all()) for part in found):
        raise UsageError("The teacher's outputs on the example inputs contain NaN or infinity.")


def imitates(graph: GraphModule, data: Data) -> bool:
    """Whether training is for the teacher's outputs alone: the task says so, and no other loss is given."""
    task = data.task or class_task(graph)
    return data.loss is None and task is not None and not needs_labels(task)


def layer_inputs(original: GraphModule, graph: GraphModule) -> tuple[str, ...]:
    """Return the names of the nodes that are inputs of layers in the graph and also exist in the original model.

    Layers are the feed-forward layers, replaced projections and experts. Inputs of the whole model are left out,
    because they cannot differ. Other inputs that the original model does not have are left out with a warning.

    Raises:
        UsageError: there is no such node, or a pass turned a stream of the graph and not that of the original model.
    """
    if OTHER_BASIS in original.meta:
        raise UsageError(
            "distill_layers compares the inputs of layers before and after the passes, but rotate turned the stream of "
            f"{original.meta[OTHER_BASIS]}, and could not turn that of the model before the passes alike. Use distill, "
            "which compares the model's outputs."
        )
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
