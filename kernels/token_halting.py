"""The operators of token halting, at which tokens stop being computed. Importing this module registers them.

Behind a block every token gets a halting score between 0 and 1. A token's scores add up, and once the sum reaches 1 -
0.01 the token halts: later blocks neither update it nor let other tokens attend to it (A-ViT, arXiv 2112.07658,
sections 3.1 and 3.2). The arguments are:

    tokens, new   [B, T, d]   floating: the tokens behind a block, before halted ones are put back
    old           [B, T, d]   the tokens before the block
    total         [B, T]      float32: the sum of a token's scores so far
    gate          [2]         floating: γ and β of the score sigmoid(γ · t[0] + β), where t[0] is the first element
    tau           scalar in [0, 1]

Scores are multiplied by tau / (1 - tau). At tau 0 they are 0 and nothing halts; at 1/2 they are those of the paper; at
1 every token halts at once. NaN never halts.

`surgeon::halting_total` adds the scores of the tokens that have not halted to `before`, [B, T] or None, and returns the
sum in float32. `surgeon::keep_halted` returns the old tokens where they have halted and the new ones elsewhere.
`surgeon::live_keys` returns which keys may be attended to, bool [B, 1, 1, T]: those that have not halted, and all of a
sample in which every token has. `surgeon::mask_keys` takes a mask or scores [..., T], forbids the other keys in a bool
one and gives them the lowest number in a floating one. `surgeon::mean_field` returns the sum over the blocks of the
tokens behind each, weighted by their scores; the last block that computed a token has what is left of 1. It takes the
tokens behind every block and the totals behind all but the last.

`surgeon::tokens_that_stay` returns the tokens to compute, int64 [B, K]: for each sample those that have not halted, in
their order, and then so many others that all samples have K, the largest number of any of them and at least 2.
`surgeon::take_tokens` returns these tokens of a value along the dimensions `dims`, for a value [B or 1, ...];
`surgeon::put_tokens` puts them back, [B, K, d] into [B, T, d].

All are differentiable where they return floating values. Wrong shapes, dtypes or devices raise `UsageError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import UsageError

__all__ = [
    "halted", "halting_total", "keep_halted", "live_keys", "mask_keys", "mean_field", "put_tokens", "take_tokens",
    "tokens_that_stay",
]  # fmt: skip

_EPSILON = 0.01
_LEAST = 1e-30  # of 1 - tau, so that scores stay finite
_FEWEST = 2  # tokens to compute: at 1 ops may take another way, which is fixed when a graph is traced


def halted(total: Tensor) -> Tensor:
    """Return which tokens have halted, bool in the shape of `total`."""
    return total.detach() > 1.0 - _EPSILON


_library = torch.library.Library("surgeon", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the registrations below: they last as long as it does."""


def _register(signature: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register an op that autograd sees through, yet that export keeps as one node."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _library.define(signature)  # type: ignore[no-untyped-call]
        _library.impl(signature.partition("(")[0], function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        return function

    return register


@_register("halting_total(Tensor tokens, Tensor? before, Tensor gate, Tensor tau) -> Tensor")
def _halting_total(tokens: Tensor, before: Tensor | None, gate: Tensor, tau: Tensor) -> Tensor:
    _check_tokens("halting_total", "tokens", tokens)
    if gate.shape != (2,) or not gate.is_floating_point() or gate.device != tokens.device:
        raise UsageError(f"halting_total: gate must be floating [2] on {tokens.device}, got {_words(gate)}")
    if tau.dim() or not tau.is_floating_point() or tau.device != tokens.device:
        raise UsageError(f"halting_total: tau must be a floating scalar on {tokens.device}, got {_words(tau)}")
    slope, offset = gate.float().unbind()
    tau = tau.float()
    score = torch.sigmoid(slope * tokens[..., 0].float() + offset) * (tau / (1.0 - tau).clamp_min(_LEAST))
    if before is None:
        return score
    _check_total("halting_total", before, tokens)
    return before + score.masked_fill(halted(before), 0.0)


@_register("keep_halted(Tensor new, Tensor old, Tensor total) -> Tensor")
def _keep_halted(new: Tensor, old: Tensor, total: Tensor) -> Tensor:
    _check_tokens("keep_halted", "new", new)
    _check_total("keep_halted", total, new)
    if old.shape != new.shape or old.dtype != new.dtype:
        raise UsageError(f"keep_halted: old must be like new {_words(new)}, got {_words(old)}")
    return torch.where(halted(total).unsqueeze(-1), old, new)


@_register("live_keys(Tensor total) -> Tensor")
def _live_keys(total: Tensor) -> Tensor:
    _check_sums("live_keys", total)
    gone = halted(total)
    # A row without a single key would be NaN. Nothing reads what a sample computes in which all tokens have halted.
    return (~gone | gone.all(-1, keepdim=True))[:, None, None, :]


@_register("mask_keys(Tensor mask, Tensor keys) -> Tensor")
def _mask_keys(mask: Tensor, keys: Tensor) -> Tensor:
    if keys.dim() != 4 or keys.dtype is not torch.bool:
        raise UsageError(f"mask_keys: keys must be bool with 4 dimensions, got {_words(keys)}")
    if mask.dtype is torch.bool:
        return mask & keys
    if not mask.is_floating_point():
        raise UsageError(f"mask_keys: mask must be bool or floating, got {_words(mask)}")
    return torch.where(keys, mask, torch.finfo(mask.dtype).min)


@_register("mean_field(Tensor[] tokens, Tensor[] totals) -> Tensor")
def _mean_field(tokens: Sequence[Tensor], totals: Sequence[Tensor]) -> Tensor:
    if len(tokens) != len(totals) + 1 or any(one.shape != tokens[0].shape for one in tokens):
        found = f"{[tuple(one.shape) for one in tokens]} and {[tuple(one.shape) for one in totals]}"
        raise UsageError(f"mean_field: tokens must be alike and one more than totals, got {found}")
    field, before = torch.zeros_like(tokens[0]), None
    for behind, total in zip(tokens, totals, strict=False):
        _check_total("mean_field", total, behind)
        reached = torch.where(halted(total), 1.0, total)
        share = reached if before is None else reached - before
        field, before = field + share.unsqueeze(-1).to(behind.dtype) * behind, reached
    if before is None:
        return tokens[-1]
    return field + (1.0 - before).unsqueeze(-1).to(tokens[-1].dtype) * tokens[-1]


@torch.library.custom_op("surgeon::tokens_that_stay", mutates_args=())
def _tokens_that_stay(total: Tensor) -> Tensor:
    _check_sums("tokens_that_stay", total)
    gone = halted(total)
    count = max(_FEWEST, int((~gone).sum(-1).max())) if total.numel() else _FEWEST
    order = gone.to(torch.uint8).argsort(dim=1, stable=True)
    # A token alone is taken twice, which changes no attention: both are the same key.
    return order.expand(-1, count).contiguous() if order.shape[1] == 1 else order[:, :count].contiguous()


@_tokens_that_stay.register_fake
def _(total: Tensor) -> Tensor:
    _check_sums("tokens_that_stay", total)
    count: Any = torch.library.get_ctx().new_dynamic_size(min=_FEWEST)
    return total.new_empty((total.shape[0], count), dtype=torch.int64)


@_register("take_tokens(Tensor value, Tensor rows, int[] dims) -> Tensor")
def _take_tokens(value: Tensor, rows: Tensor, dims: Sequence[int]) -> Tensor:
    _check_rows("take_tokens", rows, value)
    for dim in dims:
        sizes = [rows.shape[0], *value.shape[1:]]
        sizes[dim] = rows.shape[1]
        index = rows.view([size if place in (0, dim) else 1 for place, size in enumerate(sizes)])
        value = value.expand(rows.shape[0], *value.shape[1:]).gather(dim, index.expand(sizes))
    return value


@_register("put_tokens(Tensor into, Tensor rows, Tensor value) -> Tensor")
def _put_tokens(into: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    _check_rows("put_tokens", rows, into)
    if value.dim() != 3 or value.dtype != into.dtype:
        raise UsageError(f"put_tokens: value must be {into.dtype} with 3 dimensions, got {_words(value)}")
    return into.scatter(1, rows.unsqueeze(-1).expand_as(value), value)


halting_total = torch.ops.surgeon.halting_total
keep_halted = torch.ops.surgeon.keep_halted
live_keys = torch.ops.surgeon.live_keys
mask_keys = torch.ops.surgeon.mask_keys
mean_field = torch.ops.surgeon.mean_field
tokens_that_stay = torch.ops.surgeon.tokens_that_stay
take_tokens = torch.ops.surgeon.take_tokens
put_tokens = torch.ops.surgeon.put_tokens


def _check_tokens(op: str, name: str, tokens: Tensor) -> None:
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise UsageError(f"{op}: {name} must be floating with 3 dimensions, got {_words(tokens)}")


def _check_total(op: str, total: Tensor, tokens: Tensor) -> None:
    if total.dim() != 2 or not total.is_floating_point() or total.device != tokens.device:
        raise UsageError(f"{op}: total must be floating with 2 dimensions on {tokens.device}, got {_words(total)}")


def _check_sums(op: str, total: Tensor) -> None:
    if total.dim() != 2 or not total.is_floating_point():
        raise UsageError(f"{op}: total must be floating with 2 dimensions, got {_words(total)}")


def _check_rows(op: str, rows: Tensor, value: Tensor) -> None:
    if rows.dim() != 2 or rows.dtype is not torch.int64 or rows.device != value.device:
        raise UsageError(f"{op}: rows must be int64 with 2 dimensions on {value.device}, got {_words(rows)}")


def _words(tensor: Tensor) -> Any:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
