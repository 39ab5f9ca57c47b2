"""Put the converted layers of a surgery back into the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import UsageError
from surgeon.grafting.graft import graft as graft_graph
from surgeon.models.hugging_face import is_pretrained
from surgeon.surgery.artifact import load_with_inputs
from surgeon.surgery.record import earlier_passes
from surgeon.surgery.surgery import Surgery


def graft(model: nn.Module, surgery: Surgery | str | Path) -> nn.Module:
    """Return a copy of `model` with the converted layers of a surgery in it, compared with the surgery's graph.

    The copy is of the model's own class: what its class can do, such as `generate`, works. Weights that the passes
    trained come from the surgery. `set_tau`, `set_rule`, `compensate`, `token_load`, `sweep` and `tune` take it.

    >>> grafted = surgeon.graft(model, "bert-moe")  # doctest: +SKIP
    >>> surgeon.set_tau(grafted, 0.1)  # doctest: +SKIP

    Args:
        model: the model that the surgery was made from, or one of the same architecture. It is not changed.
        surgery: a surgery, or the directory of a saved one. Lowered layers skip experts; others compute all and mask.

    Returns:
        The copy, in the model's mode. Layers for which the model has no place stay dense: its attribute
        `surgeon_graft.refused` has them with reasons, and the log tells.

    Raises:
        UsageError: no converted layer can be put into the model, it has not the surgery's layers, or there are no
            example inputs.
        LoadError: the directory is not a saved surgery, or is damaged.
        TraceError: the model cannot be traced.
        VerificationError: the copy would not compute what the surgery's graph computes.
    """
    if isinstance(surgery, Surgery):
        reports = [pass_.report for pass_ in surgery.diff().passes]
        if surgery.inputs is None:
            raise UsageError("The surgery has no example inputs to compare with. Pass them to Pipeline.run as inputs=…")
        made: Any = graft_graph(model, surgery.graph, reports, surgery.inputs)
    else:
        graph, inputs = load_with_inputs(surgery)
        reports = [pass_.report for pass_ in earlier_passes(graph)]
        made = graft_graph(model, graph, reports, inputs, share=True)
    if is_pretrained(made):
        from surgeon.pretrained.quantizer import attach

        attach(made, made.surgeon_graft.plan)
    grafted: nn.Module = made
    return grafted
