"""Compare a model's outputs with those of the dense model: what imitation minimises, and how far the two agree.

The answer of a model is the floating tensors in its output, whatever its structure. Tensors called logits are compared
as distributions over their last dimension: KL divergence, and whether the most likely class is the same (top-1). Other
tensors, such as hidden states, embeddings and boxes, are compared as vectors: squared error relative to their square,
and cosine. Inner states that come along (`hidden_states`, `attentions`, `encoder_...`) count only where there is
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.collective import everywhere
from surgeon.data.batch import Batch
from surgeon.data.padding import real_tokens, token_mask
from surgeon.data.quality import Kind, Scores
from surgeon.errors import UsageError
from surgeon.models.tasks import needs_labels

TOP_1 = Kind("top-1 agreement", share=True)
DIVERGENCE = Kind("KL divergence", higher_is_better=False)
COSINE = Kind("cosine")
ERROR = Kind("squared error", higher_is_better=False)


@dataclass(frozen=True)
class Part:
    """One tensor of a model's answer, [B, ..., C]. logits: whether its last dimension holds scores of classes."""

    values: Tensor
    logits: bool

    def rows(self, batch: Batch) -> Tensor:
        """Return the values of samples or of real tokens, [N, C], in float32."""
        return (real_tokens(batch, self.values) if self.values.dim() > 2 else self.vectors).float()

    @property
    def vectors(self) -> Tensor:
        """The values with at least two dimensions: [B] becomes [B, 1]."""
        return self.values.unsqueeze(-1) if self.values.dim() < 2 else self.values


def made_for(task: str | None, of_class: str | None) -> str | None:
    """Return the task that tells what outputs without names are: logits if it has labels, else vectors.

    They are logits where nothing is known, and vectors where the dense model is to be imitated and nothing else is
    known.

    Args:
        task: the task that was given, None if none was. of_class: that of the model's class.
    """
    found = next((known for known in (task, of_class) if needs_labels(known)), None)
    return "classification" if found is None and task is None and of_class is None else found


def answer(outputs: Any, task: str | None = None) -> list[Part]:
    """Return the tensors that make up a model's answer.

    Args:
        outputs: a tensor, or a tuple, dict or output object that holds tensors.
        task: what the model was made for (see `made_for`). With a task that has labels, a tensor without a name is
            logits.

    Raises:
        UsageError: the output has no floating tensor.
    """
    found = [(name, leaf) for name, leaf in _leaves(outputs) if leaf.is_floating_point() and name != "loss"]
    outer = [(name, leaf) for name, leaf in found if not _is_inner(name)]
    if not found:
        raise UsageError(f"The model's output, a {type(outputs).__name__}, has no floating tensor to imitate.")
    chosen = outer or found
    if needs_labels(task) and not chosen[0][0]:
        chosen = [("logits", chosen[0][1])]
    return [Part(leaf, "logits" in name and leaf.dim() > 1 and leaf.shape[-1] > 1) for name, leaf in chosen]


def _is_inner(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("encoder_") or last.endswith(("hidden_states", "attentions")) or "past_key_values" in name


def _leaves(outputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of an output with the names of the fields they are in, joined; "" without a field."""
    if isinstance(outputs, Tensor):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _leaves(value, f"{name}.{key}".strip("."))
    elif isinstance(outputs, tuple | list):
        fields = getattr(outputs, "_fields", [""] * len(outputs))
        for field, value in zip(fields, outputs, strict=True):
            yield from _leaves(value, f"{name}.{field}".strip("."))
    elif hasattr(outputs, "__dict__"):
        yield from _leaves(vars(outputs), name)
    else:
        yield from ((name, leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def divergence(expected: Any, outputs: Any, batch: Batch, task: str | None = None) -> Tensor:
    """Return how far outputs are from the dense model's, a scalar in float32: what imitation minimises.

    It is the sum over the parts of the answer: for logits KL(expected ‖ outputs) in nats, the mean over samples or real
    tokens; for other tensors the squared error over samples or real tokens, relative to their squared size.
    """
    wanted, found = answer(expected, task), answer(outputs, task)
    return torch.stack([_distance(a, b, batch) for a, b in zip(wanted, found, strict=True)]).sum()


def _distance(want: Part, got: Part, batch: Batch) -> Tensor:
    a, b = want.rows(batch), got.rows(batch)
    if want.logits:
        total = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum")
        return everywhere(total) / everywhere(total.new_tensor(len(b)))
    return relative_square(b - a, a)


def relative_square(error: Tensor, size: Tensor) -> Tensor:
    """Return Σ error² / Σ size² over the batches of all processes, a scalar."""
    return everywhere(error.square().sum()) / everywhere(size.square().sum()).clamp_min(1e-12)


class AgreementMeter:
    """Adds up the agreement with the dense model batch by batch."""

    def __init__(self, task: str | None = None) -> None:
        """task: what the model was made for, if known (see `answer`)."""
        self._task = task
        self._parts: dict[Kind, list[tuple[Tensor, Tensor]]] = {}

    def add(self, expected: Any, outputs: Any, batch: Batch) -> None:
        """Count one batch. expected: the dense model's outputs."""
        found: dict[Kind, list[tuple[Tensor, Tensor]]] = {}
        for want, got in zip(answer(expected, self._task), answer(outputs, self._task), strict=True):
            for kind, values, weights in _compared(want.vectors.float(), got.vectors.float(), logits=want.logits):
                mask = token_mask(batch, values.shape) if values.dim() > 1 else None
                if mask is not None:
                    values, weights = values * mask, weights * mask
                found.setdefault(kind, []).append((_by_sample(values, batch), _by_sample(weights, batch)))
        for kind, parts in found.items():
            totals, items = (torch.stack([part[side] for part in parts]).mean(0) for side in (0, 1))
            self._parts.setdefault(kind, []).append((totals, items))

    def scores(self) -> list[Scores]:
        """Return the scores of all samples: top-1 agreement and KL divergence, cosine, or squared error."""
        return [Scores.joined(_with_unit(kind, parts), parts) for kind, parts in self._parts.items()]


def _compared(a: Tensor, b: Tensor, *, logits: bool) -> Iterator[tuple[Kind, Tensor, Tensor]]:
    """Compare [B, ..., C] and yield what is measured, its values and their weights, both [B, ...] in float64."""
    one = torch.ones(a.shape[:-1], dtype=torch.float64, device=a.device)
    if logits:
        same = (a.argmax(-1) == b.argmax(-1)) & ~b.isnan().any(-1)
        yield TOP_1, same.double(), one
        pointwise = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none")
        yield DIVERGENCE, pointwise.sum(-1).double().clamp_min(0.0), one  # rounding can make it negative
    elif a.shape[-1] > 1:
        yield COSINE, F.cosine_similarity(a, b, dim=-1).double(), one
    else:  # the cosine of single numbers is only their sign
        yield ERROR, (b - a).double().square().sum(-1), a.double().square().sum(-1)


def _by_sample(values: Tensor, batch: Batch) -> Tensor:
    """Sum [B, ...] over each sample. Where the first dimension is no batch, the whole batch counts as one sample."""
    samples = batch.size if values.shape[0] == batch.size else 1
    return values.reshape(samples, -1).sum(1).cpu()


def _with_unit(kind: Kind, parts: list[tuple[Tensor, Tensor]]) -> Kind:
    tokens = kind is not ERROR and any(bool((items != 1).any()) for _, items in parts)
    return Kind(kind.name, kind.higher_is_better, "tokens" if tokens else "samples", kind.share)
