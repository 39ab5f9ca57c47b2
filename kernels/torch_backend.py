"""The dynamic-k FFN in plain torch: forward and backward that compute only the selected experts.

There are four ways through. *By expert*: gather the tokens that selected an expert, run it, add the rows back.
*By neuron*: for few tokens, read the weights of each token's selected neurons where they are, as a sparse product.
*Together*: copy the experts that any token selected and run those as one layer, with the pairs that are not selected
masked. *Dense*: the same with every expert, where nothing is copied. `_plan` takes what should be cheapest, so
selecting much costs about what the dense FFN costs. All give the same result up to rounding.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, activation

# The costs `_plan` weighs, in units of one neuron for one token: a multiply-add for each weight of the neuron. Measured
# in fp32 on one thread, with inputs and outputs of width 768.
_ROW_COST = 30  # gathering the row of one token and adding it back to the output, for one expert
_READ_COST = 6  # reading the weights of one neuron from memory
_COPY_COST = 7  # copying them besides
_EXPERT_COST = 700_000  # the calls for one more expert, to be divided by the number of weights of a neuron
_PAIR_COST = 5  # of one neuron for one token, where nothing is shared between tokens
_SPARSE_COST = 3_000_000  # the calls of a sparse product, to be divided likewise

# Up to so many tokens neurons may be run one by one: the fewer, the less they share.
_FEW_TOKENS = 16

_HALF = (torch.float16, torch.bfloat16)


class Experts(NamedTuple):
    """The weights of E experts of s neurons each, one contiguous row per neuron.

    w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out]; b1, gate and b_gate may be None.
    """

    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor

    def flat(self) -> Experts:
        """All experts as one of E·s neurons: a view if the weights are contiguous."""
        return Experts(*(None if t is None else t.flatten(0, 1) for t in self))  # type: ignore[arg-type]

    def after(self, first: int) -> Experts:
        """The experts from `first` on: views."""
        return Experts(*(None if t is None else t[first:] for t in self))  # type: ignore[arg-type]

    def take(self, chosen: Tensor) -> Experts:
        """Copies of the experts `chosen` [n]."""
        return Experts(*(None if t is None else t.index_select(0, chosen) for t in self))  # type: ignore[arg-type]

    def one(self, expert: int) -> Experts:
        """One expert: views."""
        return Experts(*(None if t is None else t[expert] for t in self))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Experts:
        """The weights in `dtype`: themselves if they have it already."""
        if self.w1.dtype == dtype:
            return self
        return Experts(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


class Gradients(NamedTuple):
    """Gradients of the inputs of the same name; None where not asked for or where there is no such input."""

    x: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor | None


class _Together(NamedTuple):
    """All experts, or those of `used` [U]; `mask` [N, U] unless every pair of them is selected."""

    used: Tensor | None
    mask: Tensor | None


class _ByNeuron(NamedTuple):
    """For every token the neurons of the experts it selected, numbered over all experts, as a sparse matrix has them.

    columns [pairs·s]: neurons, of one token after another. ends [N + 1]: where the tokens begin and end in them.
    """

    columns: Tensor
    ends: Tensor


class _ByExpert(NamedTuple):
    """For each expert that is used the tokens that selected it [n], a slice if all did.

    most: the largest n.
    """

    rows: dict[int, Tensor | slice]
    most: int


def selected(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return the mask [..., E] of the experts that run: the one definition of the selection rule.

    An expert runs for a token unless its score is below the token's threshold. Ties run; a NaN in either runs, so a
    token that is NaN stays NaN, as it does in the dense FFN.

    Args:
        scores: [..., E], any floating dtype.
        threshold: [...], one per token.
    """
    return ~(scores < threshold.unsqueeze(-1))


def hidden(x: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Return the hidden activations [..., m] of `x` [..., d_in] for one expert of m neurons (or a flat view of all)."""
    up = F.linear(x, experts.w1, experts.b1)
    return act.fn(up) if experts.gate is None else act.fn(F.linear(x, experts.gate, experts.b_gate)) * up


def keep_selected(h: Tensor, mask: Tensor) -> Tensor:
    """Zero what `mask` [..., E] does not select in `h` [..., E·s]; by filling, which removes NaN as well."""
    experts = mask.shape[-1]
    return h.view(*mask.shape, h.shape[-1] // experts).masked_fill(~mask.unsqueeze(-1), 0).view(h.shape)


def forward(x: Tensor, mask: Tensor, experts: Experts, b2: Tensor | None, activation_name: str) -> Tensor:
    """Return Σ over selected experts of h_e w2_e, plus b2: a new contiguous tensor [N, d_out] in the dtype of `x`.

    Sums over experts are accumulated in fp32 for half types.

    Args:
        x: [N, d_in].
        mask: [N, E] bool.
        experts: the weights, same dtype as `x`.
        b2: [d_out] or None.
        activation_name: a name of `ACTIVATIONS`.
    """
    act, dtype, result_dtype = activation(activation_name), _compute_dtype(x), x.dtype
    out = x.new_zeros(x.shape[0], experts.w2.shape[2], dtype=_accumulator(x.dtype))
    if b2 is not None:
        out.copy_(b2)
    x = x.to(dtype)
    sparse = x.device.type == "cpu" and dtype in (torch.float32, torch.float64) and experts.w1.dtype == dtype
    match _plan(mask, experts, sparse=sparse):
        case _ByExpert(rows_of, most):
            # Of the size of the output: made once, not for every expert.
            gathered, product = x.new_empty(most, x.shape[1]), x.new_empty(most, out.shape[1])
            for expert, rows in rows_of.items():
                weights = experts.one(expert).to(dtype)
                _add_product(out, rows, hidden(_take(x, rows, gathered), weights, act), weights.w2, product)
        case _ByNeuron() as way:
            out.add_(_by_neuron(x, way, experts.flat(), act))
        case _Together(used, mask_or_none):
            flat = (experts if used is None else experts.take(used)).flat().to(dtype)
            h = hidden(x, flat, act)
            if mask_or_none is not None:
                h = keep_selected(h, mask_or_none)
            _add_product(out, slice(None), h, flat.w2)
    return out.to(result_dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    experts: Experts,
    activation_name: str,
    *,
    need_x: bool = True,
    need_weights: bool = True,
) -> Gradients:
    """Return the gradients of `forward`, all but b2's, given `grad` [N, d_out]. Hidden activations are recomputed.

    Gradients have the shapes and dtypes of their inputs; those of experts no token selected are zero.
    """
    act, dtype = activation(activation_name), _compute_dtype(x)
    source, grad = x.to(dtype), grad.to(dtype)
    grad_x = torch.zeros_like(x, dtype=_accumulator(x.dtype), memory_format=torch.contiguous_format) if need_x else None
    grads = Experts(*(None if t is None or not need_weights else t.new_zeros(t.shape) for t in experts))  # type: ignore[arg-type]

    def run(one: Experts, grad_one: Experts | None, rows: Tensor | slice, keep: Tensor | None) -> None:
        inputs, grad_out = _take(source, rows), _take(grad, rows)
        up = F.linear(inputs, one.w1, one.b1)
        grad_h = F.linear(grad_out, one.w2)
        if keep is not None:
            grad_h = keep_selected(grad_h, keep)
        z = None if one.gate is None else F.linear(inputs, one.gate, one.b_gate)
        if z is None:
            h, grad_z, grad_up = act.fn(up), None, act.backward(grad_h, up)
        else:
            a = act.fn(z)
            h, grad_z, grad_up = a * up, act.backward(grad_h * up, z), grad_h * a
        if grad_x is not None:
            _add_product(grad_x, rows, grad_up, one.w1)
            if grad_z is not None and one.gate is not None:
                _add_product(grad_x, rows, grad_z, one.gate)
        if grad_one is not None:
            grad_one.w2.copy_(torch.mm((h if keep is None else keep_selected(h, keep)).t(), grad_out))
            for target, bias, g in ((grad_one.w1, grad_one.b1, grad_up), (grad_one.gate, grad_one.b_gate, grad_z)):
                if target is not None and g is not None:
                    target.copy_(torch.mm(g.t(), inputs))
                if bias is not None and g is not None:
                    bias.copy_(g.sum(0))

    match _plan(mask, experts, copies=False):
        case _ByExpert(rows_of, _):
            for expert, rows in rows_of.items():
                run(experts.one(expert).to(dtype), grads.one(expert) if need_weights else None, rows, None)
        case _Together(_, mask_or_none):
            run(experts.flat().to(dtype), grads.flat() if need_weights else None, slice(None), mask_or_none)
    return Gradients(None if grad_x is None else grad_x.to(x.dtype), *grads)


def _by_neuron(x: Tensor, way: _ByNeuron, experts: Experts, act: Activation) -> Tensor:
    """Σ over the neurons of `way` of h w2, [N, d_out]: sparse products, which copy no weights but biases.

    experts: flat.
    """
    neurons = len(experts.w1)

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        start = x.new_zeros(len(way.columns)) if bias is None else bias.index_select(0, way.columns)
        sparse = torch.sparse_csr_tensor(way.ends, way.columns, start, (len(x), neurons), check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(sparse, x, weight.t())
        return product.values()

    up = linear(experts.w1, experts.b1)
    h = act.fn(up) if experts.gate is None else act.fn(linear(experts.gate, experts.b_gate)) * up
    return F.embedding_bag(
        way.columns, experts.w2, way.ends, mode="sum", per_sample_weights=h, include_last_offset=True
    )


@cache
def _sparse_products() -> None:
    """Let PyTorch say, unheard, that its sparse matrices are in beta, which it says once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _plan(
    mask: Tensor, experts: Experts, *, copies: bool = True, sparse: bool = False
) -> _Together | _ByExpert | _ByNeuron:
    """Choose the cheapest way through the selected pairs of `mask` [N, E].

    copies: whether experts may be copied. sparse: whether there are sparse products of their dtype.
    """
    (tokens, count), neurons = mask.shape, experts.w1.shape[1]
    weights_per_neuron = sum(t.shape[-1] for t in (experts.w1, experts.gate, experts.w2) if t is not None)
    counts: list[int] = mask.sum(0).tolist()
    pairs, used = sum(counts), sum(map(bool, counts))
    costs = {
        "dense": count * neurons * (tokens + _READ_COST),
        "expert": used * (_EXPERT_COST / weights_per_neuron + _READ_COST * neurons) + pairs * (neurons + _ROW_COST),
    }
    if copies:
        costs["copies"] = used * neurons * (tokens + _READ_COST + _COPY_COST)
    if sparse and tokens <= _FEW_TOKENS:
        costs["neuron"] = pairs * neurons * _PAIR_COST + _SPARSE_COST / weights_per_neuron
    if pairs == tokens * count or (way := min(costs, key=costs.__getitem__)) == "dense":
        return _Together(None, None if pairs == tokens * count else mask)
    if way == "copies":
        chosen = mask.any(0).nonzero()[:, 0]
        return _Together(chosen, None if pairs == tokens * used else mask.index_select(1, chosen))
    if way == "neuron":
        _sparse_products()
        chosen = mask.reshape(-1).nonzero()
        # Of each expert that runs the neurons, one token after the other.
        columns = (chosen.remainder_(count) * neurons + torch.arange(neurons, device=mask.device)).view(-1)
        ends = F.pad(mask.sum(1).cumsum(0), (1, 0)) * neurons
        return _ByNeuron(columns, ends)
    rows = mask.t().nonzero()[:, 1].split_with_sizes(counts)
    return _ByExpert({e: slice(None) if n == tokens else rows[e] for e, n in enumerate(counts) if n}, max(counts))


def _take(source: Tensor, rows: Tensor | slice, into: Tensor | None = None) -> Tensor:
    """The rows; `into`, which has at least as many, is overwritten with them where they are copied."""
    if isinstance(rows, slice):
        return source[rows]
    return torch.index_select(source, 0, rows, out=None if into is None else into[: len(rows)])


def _add_product(out: Tensor, rows: Tensor | slice, a: Tensor, b: Tensor, into: Tensor | None = None) -> None:
    """Add `a @ b` to `rows` of `out`, whose dtype may be wider; `into` [at least len(a), d] may be overwritten."""
    if not isinstance(rows, slice):
        product = torch.mm(a, b, out=None if into is None else into[: len(a)])
        out.index_add_(0, rows, product.to(out.dtype))
    elif out.dtype == a.dtype:
        out[rows].addmm_(a, b)
    else:
        out[rows].add_(torch.mm(a, b))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply matrices in: fp32 for half types on processors that would only emulate them."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in _HALF and not _multiplies(x.dtype) else x.dtype


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has a fast matrix product for a half type."""
    mkldnn = torch.ops.mkldnn
    fast = mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
    return bool(fast)
