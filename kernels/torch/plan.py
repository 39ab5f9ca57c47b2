"""Choose the cheapest way to compute the dynamic-k FFN in plain torch, by what is selected and the experts' sizes."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from surgeon.kernels.experts import Experts

HALF = (torch.float16, torch.bfloat16)

# The costs `plan` weighs, in units of one neuron for one token: a multiply-add for each weight of the neuron, where
# many tokens share it. Measured in fp32 on one thread (AVX-512), with inputs and outputs of width 768.
_READ_COST = 25  # reading the weights of one neuron from memory
_COPY_COST = 45  # copying them besides
_FEW_COST, _FEW_MOST = 5, 40  # of one neuron for each of few tokens, and for all of them at most
_ROW_COST = 45  # gathering the row of one token and adding it back to the output, for one expert
_PAIR_COST = 37  # of one neuron for one token, where nothing is shared between tokens
# Costs of calls, to be divided by the number of weights of a neuron:
_EXPERT_COST = 2_500_000  # those for one more expert
_RUN_COST = 1_100_000  # for one more run
_SPARSE_COST = 23_000_000  # of a sparse product
# For CPUs that multiply half types: how much faster than fp32 their products are, and by what factors the costs of
# copies, rows and calls change, relative to products in fp32.
_HALF_SPEED, _HALF_COPY, _HALF_ROW, _HALF_CALL = 5, 0.5, 1.7, 8

# Up to this many tokens, neurons may be run one by one: the fewer tokens, the less they share.
_FEW_TOKENS = 16


class Together(NamedTuple):
    """All experts, or those of `used` [U]; `mask` [N, U] unless every pair of them is selected."""

    used: Tensor | None
    mask: Tensor | None


class InRuns(NamedTuple):
    """The neurons of the experts that all tokens selected, numbered over all experts, in as few slices as possible."""

    runs: list[slice]


class ByNeuron(NamedTuple):
    """The neurons of the experts that each token selected, numbered over all experts, as in a sparse matrix.

    columns [pairs·s]: the neurons of one token after another. ends [N + 1]: where each token begins and ends in them.
    """

    columns: Tensor
    ends: Tensor


class ByExpert(NamedTuple):
    """For each expert that is used, the tokens [n] that selected it, or None if all did.

    most: the largest n.
    """

    rows: dict[int, Tensor | None]
    most: int


def plan(
    mask: Tensor, experts: Experts, *, forward: bool = True, sparse: bool = False
) -> Together | InRuns | ByExpert | ByNeuron:
    """Choose the cheapest way to compute the selected pairs of `mask` [N, E].

    forward: whether experts may be copied or joined. sparse: whether their dtype has sparse products.
    """
    (tokens, count), neurons = mask.shape, experts.w1.shape[1]
    # For a single token the mask itself holds the counts.
    counts: list[int] = (mask[0] if tokens == 1 else mask.sum(0, dtype=torch.int32)).tolist()
    pairs = sum(counts)
    if pairs == tokens * count:
        return Together(None, None)
    chosen = [expert for expert, n in enumerate(counts) if n]
    used = len(chosen)
    half = mask.device.type == "cpu" and experts.w1.dtype in HALF and multiplies(experts.w1.dtype)
    # The cost of a call is to be divided by the weights of a neuron.
    call = (_HALF_CALL if half else 1) / sum(
        t.shape[-1] for t in (experts.w1, experts.gate, experts.w2) if t is not None
    )
    row, copy = (_HALF_ROW * _ROW_COST, _HALF_COPY * _COPY_COST) if half else (_ROW_COST, _COPY_COST)

    def product(n: float) -> float:
        """The cost of one neuron for n tokens."""
        return _READ_COST + (n / _HALF_SPEED if half else max(n, min(n * _FEW_COST, _FEW_MOST)))

    costs = {
        "dense": count * neurons * product(tokens),
        "expert": used * (_EXPERT_COST * call + neurons * product(pairs / max(used, 1))) + pairs * row,
    }
    runs = _runs(chosen, neurons) if forward and pairs == tokens * used else []
    if runs:
        costs["runs"] = len(runs) * _RUN_COST * call + used * neurons * product(tokens)
    if forward:
        costs["copies"] = used * neurons * (product(tokens) + copy)
    if sparse and tokens <= _FEW_TOKENS:
        costs["neuron"] = pairs * neurons * _PAIR_COST + _SPARSE_COST * call
    match min(costs, key=costs.__getitem__):
        case "dense":
            return Together(None, mask)
        case "runs":
            return InRuns(runs)
        case "copies":
            index = mask.any(0).nonzero()[:, 0]
            return Together(index, None if pairs == tokens * used else mask.index_select(1, index))
        case "neuron":
            _sparse_products()
            index = mask.reshape(-1).nonzero()
            # The neurons of each expert that runs, one token after the other.
            columns = (index.remainder_(count) * neurons + torch.arange(neurons, device=mask.device)).view(-1)
            ends = F.pad(mask.sum(1).cumsum(0), (1, 0)) * neurons
            return ByNeuron(columns, ends)
    counts = [int(n) for n in counts]
    rows = mask.t().nonzero()[:, 1].contiguous().split_with_sizes(counts)
    return ByExpert({e: None if counts[e] == tokens else rows[e] for e in chosen}, max(counts))


def _runs(chosen: list[int], neurons: int) -> list[slice]:
    """The neurons of the experts `chosen`, which ascend, as slices: one for all experts that follow each other."""
    runs: list[slice] = []
    for expert in chosen:
        first = expert * neurons
        if runs and runs[-1].stop == first:
            first = runs.pop().start
        runs.append(slice(first, (expert + 1) * neurons))
    return runs


@cache
def _sparse_products() -> None:
    """Suppress PyTorch's warning that its sparse matrices are in beta, which it gives once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has a fast matrix product for a half type."""
    mkldnn = torch.ops.mkldnn
    fast = mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
    return bool(fast)
