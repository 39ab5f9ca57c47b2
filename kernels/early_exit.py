"""The operators of early exits, at which samples leave a model. Importing this module registers them.

A small head after a block classifies every sample. A sample leaves there if the head is sure enough: the rest of the
model need not run for it ("Zero Time Waste", arXiv 2106.05409). The arguments are:

    logits     [B, C]   floating: the head's classes
    rest       [B, C]   floating: what the rest of the model answers
    tau        scalar in [0, 1]: how unsure a head may be

A sample leaves if 1 - p < tau in float32, where p is the largest of its class probabilities. So nothing leaves at tau
0, also if p is rounded to 1, and everything leaves at tau 1. NaN never leaves.

`surgeon::exit_or` returns the logits of the samples that leave and the rest of the others, [B, C] in the dtype of
`rest`. It is differentiable and needs the rest for every sample. `surgeon::rows_that_stay` returns the indices of the
samples that do not leave, int64 [n] in ascending order, so that the rest can be computed for them alone. Wrong shapes,
dtypes or devices raise `UsageError`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.errors import UsageError

__all__ = ["exit_or", "leaves", "rows_that_stay"]


def leaves(logits: Tensor, tau: Tensor) -> Tensor:
    """Return which samples leave, bool [B]."""
    with torch.no_grad():
        p = logits.detach().float().softmax(-1)
        return 1.0 - p.amax(-1) < tau.detach().float()


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registration below: it lasts as long as it does."""

_library.define("exit_or(Tensor logits, Tensor rest, Tensor tau) -> Tensor")  # type: ignore[no-untyped-call]


def _exit_or(logits: Tensor, rest: Tensor, tau: Tensor) -> Tensor:
    _check("exit_or", logits, tau)
    if rest.dim() != 2 or rest.shape[1] != logits.shape[1] or not rest.is_floating_point():
        raise UsageError(f"exit_or: rest must be like logits {_words(logits)}, got {_words(rest)}")
    return torch.where(leaves(logits, tau).unsqueeze(-1), logits.to(rest.dtype), rest)


# Composite: autograd sees through it, yet export keeps it as one node.
_library.impl("exit_or", _exit_or, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.custom_op("surgeon::rows_that_stay", mutates_args=())
def _rows_that_stay(logits: Tensor, tau: Tensor) -> Tensor:
    _check("rows_that_stay", logits, tau)
    return (~leaves(logits, tau)).nonzero().flatten()


@_rows_that_stay.register_fake
def _(logits: Tensor, tau: Tensor) -> Tensor:
    _check("rows_that_stay", logits, tau)
    count: Any = torch.library.get_ctx().new_dynamic_size()
    return logits.new_empty((count,), dtype=torch.int64)


exit_or = torch.ops.surgeon.exit_or
rows_that_stay = torch.ops.surgeon.rows_that_stay


def _check(op: str, logits: Tensor, tau: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UsageError(f"{op}: logits must be floating with 2 dimensions, got {_words(logits)}")
    if tau.dim() or not tau.is_floating_point() or tau.device != logits.device:
        raise UsageError(f"{op}: tau must be a floating scalar on {logits.device}, got {_words(tau)}")


def _words(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
