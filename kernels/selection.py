"""The rules that select a token's experts: they turn its scores and the knob tau into one threshold per token.

`surgeon::selection_threshold(scores, tau, rule)` takes non-negative scores [..., E] and tau, a scalar tensor in [0, 1].
It returns the threshold [...], in float32 or wider. An expert runs unless its score is below the threshold
(`experts.selected`). In every rule a larger tau is cheaper, tau = 0 runs every expert, and at least one runs:

| rule | an expert is skipped if | source |
| --- | --- | --- |
| max | its score is below tau times the token's largest | D2DMoE, section 3.4 |
| cumulative | it is among the smallest, whose scores sum to less than tau of the token's sum | D2DMoE's first version |
| energy | the same for squared scores and tau² (orthogonal outputs would then differ by a share tau of their norm) | |
| top_k | it is among the tau · E smallest, rounded down | MoEfication (arXiv 2110.01786) |

All rules except `max` go through a token's scores in ascending order: `surgeon::sorted_threshold`. The native kernels
and those for GPUs compute it without sorting. Torch sorts: with hundreds of experts and many tokens, this takes a good
part of the time that skipping experts saves.

E counts the experts that are scored, without those that always run. Experts with equal scores run or are skipped
together. The tau in the code of D2DMoE's authors is 1 − tau here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.kernels.backends import backends

RULES = ("max", "cumulative", "energy", "top_k")


def check_rule(rule: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        UsageError: lists the rules that exist.
    """
    if rule not in RULES:
        raise UsageError(f"No selection rule '{rule}'. There are: {', '.join(RULES)}.")


def _selection_threshold(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    check_rule(rule)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if rule == "max":
        return scores.amax(-1) * tau
    return torch.ops.surgeon.sorted_threshold(scores, tau, rule)  # type: ignore[no-any-return]


def _by_a_backend(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    for backend in backends():
        if backend.sorted_threshold is not None:
            found = backend.sorted_threshold(scores, tau, rule)
            if found is not None:
                return found
    return sorted_threshold(scores, tau, rule)


def sorted_threshold(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """Compute `surgeon::sorted_threshold` in torch."""
    ascending = scores.sort(-1).values
    if rule == "top_k":
        # The epsilon: a share such as 0.29 of 100 is 28.999… in floating point.
        skipped = (tau * scores.shape[-1] + 1e-4).floor().clamp(max=scores.shape[-1] - 1).long()
        return ascending.index_select(-1, skipped.reshape(1)).squeeze(-1)
    amounts, share = (ascending, tau) if rule == "cumulative" else (ascending.square(), tau.square())
    running = amounts.cumsum(-1)
    # The largest is never skipped, whatever rounding does to the sum.
    skips = (running < share * running[..., -1:])[..., :-1]
    return ascending.gather(-1, skips.sum(-1, keepdim=True)).squeeze(-1)


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registration below: it lasts as long as it does."""

_library.define("selection_threshold(Tensor scores, Tensor tau, str rule) -> Tensor")  # type: ignore[no-untyped-call]
# Composite: autograd and compilers see through it, yet export keeps it as one node, whose rule can be changed later.
_library.impl("selection_threshold", _selection_threshold, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

_SORTED = "(Tensor scores, Tensor tau, str rule) -> Tensor"
_library.define("sorted_threshold" + _SORTED)  # type: ignore[no-untyped-call]
_library.impl("sorted_threshold", _by_a_backend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
# Which experts run is a step function of the scores: there is no gradient.
_library.impl("sorted_threshold", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
# What the native kernels hand on: float64.
_library.define("sorted_threshold_torch" + _SORTED)  # type: ignore[no-untyped-call]
_library.impl("sorted_threshold_torch", sorted_threshold, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("surgeon::sorted_threshold", lib=_library)  # type: ignore[untyped-decorator]
def _(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    return scores.new_empty(scores.shape[:-1])


@torch.library.register_vmap("surgeon::sorted_threshold", lib=_library)  # type: ignore[untyped-decorator]
def _(info: object, in_dims: tuple[int | None, ...], scores: Tensor, tau: Tensor, rule: str) -> tuple[Tensor, int]:
    if in_dims[1] is not None:
        raise UsageError("surgeon::sorted_threshold: vmap cannot map over tau. Give all calls the same tau.")
    return torch.ops.surgeon.sorted_threshold(scores.movedim(in_dims[0] or 0, 0), tau, rule), 0


selection_threshold = torch.ops.surgeon.selection_threshold
