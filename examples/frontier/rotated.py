"""Without training: layers that skip inputs and are refitted, with the stream turned before and without.

python examples/frontier/rotated.py digits WORK OUT.json
python examples/frontier/rotated.py code WORK OUT.json

The passes are run on a trained dense model, and the divergence from it is measured on held-out data, as in
skipped_inputs.py, whose data and WORK these are. The cost is the share of the multiply-adds of all linear layers that
ran on these data. What OUT has already is not done again.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from skipped_inputs import Task, opened
from torch import Tensor
from untrained import at

from surgeon.measure.meter import measure
from surgeon.passes import Pass, Refit, Rotate, SparsifyInputs
from surgeon.surgery.pipeline import Pipeline

TAUS = (0.45, 0.5, 0.55, 0.6, 0.65)
COSTS = (0.4, 0.5)
BEFORE: dict[str, list[Pass[Any]]] = {
    "no rotate": [],
    "rotate": [Rotate()],
    "rotate, heads=false": [Rotate(heads=False)],
}


def as_input(task: str, batch: Tensor) -> Any:
    return batch if task == "digits" else {"input_ids": batch}


@torch.no_grad()
def point(task: Task, name: str, before: list[Pass[Any]], tau: float, dense: Tensor) -> tuple[float, float, float]:
    """The cost, the divergence and the quality at a tau."""
    data = [as_input(name, batch) for batch in task.seen]
    passes = [*before, SparsifyInputs(tau=tau), Refit()]
    graph = Pipeline(passes).run(task.model, inputs=as_input(name, task.seen[0][:2]), data=data).graph.eval()
    ran = whole = 0
    answers = []
    for batch in task.held:
        args = (batch,) if name == "digits" else ()
        kwargs = {} if name == "digits" else {"input_ids": batch}
        found = measure(graph, args, kwargs)[1].values()
        ran += sum(layer.executed_multiply_adds for layer in found)
        whole += sum(layer.multiply_adds for layer in found)
        output = graph(*args, **kwargs)
        answers.append((output if isinstance(output, Tensor) else output.logits).float().log_softmax(-1))
    logits = torch.cat(answers)
    divergence = float((dense.exp() * (dense - logits)).sum(-1).mean())
    return ran / whole, divergence, task.quality(logits)


def table(found: dict[str, list[Any]]) -> str:
    """The divergence at equal cost, as Markdown."""
    lines = [f"| before | {' | '.join(f'{cost:.0%}' for cost in COSTS)} |", "| --- " * (1 + len(COSTS)) + "|"]
    for name, points in found.items():
        values = [at([one[:2] for one in points], cost) for cost in COSTS]
        lines.append(f"| {name} | {' | '.join('—' if value is None else f'{value:.4f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    args, found, task = opened(__doc__, "before")
    with torch.no_grad():
        dense = task.answers()
    for name, before in BEFORE.items():
        if name not in found["before"]:
            found["before"][name] = sorted(point(task, args.task, before, tau, dense) for tau in TAUS)
            args.out.write_text(json.dumps(found, indent=1))
    print(table(found["before"]))


if __name__ == "__main__":
    main()
