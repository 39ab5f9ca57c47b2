"""Model the time of a dense and a dynamic-k FFN on a GPU, from bytes and FLOPs. This is not a measurement.

A layer takes as long as the slowest of its arithmetic, its traffic to memory and its traffic to the L2 cache. The time
to add up the experts' outputs for each token and the minimum time of each kernel are added to this. Rates come from the
vendors' publications (`devices`). fp32 is multiplied in full precision, PyTorch's default, without tensor cores.

Vendors do not publish which share of these rates kernels reach, nor the minimum time of a kernel. These numbers are
assumed, so that the model meets times on one H100 (`ASSUMPTIONS` says so to users). The model favours the dense layer:
its products lose nothing to odd sizes or the cache. Ours pays for:

- padding: an expert to 16, 32, 64, ... neurons, and its tokens to tiles of rows;
- reading the weights of an expert again for every tile, and gathering rows;
- the hidden values of experts that are not fused;
- adding up: atomically in the L2 cache if the fp32 output fits there, otherwise by writing the output of every pair of
  token and expert and reading it again.

What does not fit in half of the cache goes to memory. Experts are selected independently with the same probability.
Scores are given, and the router's cost is not included. `surgeon.kernels.triton` says which kernels are launched.

There are three ways to compute the layer (`Way`). `fastest_way` takes the one that should be fastest if a fifth of the
experts is selected, because only the device knows how many are, and too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from surgeon.errors import UsageError
from surgeon.kernels.gpu_model.devices import Device

Bound = Literal["arithmetic", "memory", "cache", "sums", "launches"]
Way = Literal["experts", "spread", "masked"]
"""How the layer is computed. experts: both products expert by expert. spread: the first one expert by expert, and the
second one densely over hidden values, which are zero if their expert did not run. masked: both products densely, with a
mask between them."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DENSE_EFFICIENCY = 0.7
_EXPERT_EFFICIENCY = {"float32": 0.35, "bfloat16": 0.5, "float16": 0.5}
_MEMORY_EFFICIENCY = 0.9
_CACHE_EFFICIENCY = 0.6
_GATHER_EFFICIENCY = 0.65  # of the cache's bandwidth, for rows of x
_ATOMIC_EFFICIENCY = 0.22  # of the cache's bandwidth
_PARTIAL_EFFICIENCY = 0.57  # of the memory's bandwidth, for the pairs' outputs: scattered rows
_LAUNCH = 5e-6  # seconds
_FEW_TOKENS = 16  # up to this many tokens, one kernel does it without a plan
_PLAN_LAUNCHES = 4
_USUAL_SHARE = 0.2  # the host does not know how many experts are selected
_SCORE = 4  # bytes: scores, places in the plan and sums are all of 4
_NARROWEST = {"float32": 64, "bfloat16": 16, "float16": 16}  # neurons in a tile: fewer take equally long
_WIDEST = 128  # more take several tiles

ASSUMPTIONS = (
    f"Dense products reach {_DENSE_EFFICIENCY:.0%} of the arithmetic rate. Products by expert reach "
    f"{_EXPERT_EFFICIENCY['bfloat16']:.0%}, in float32 {_EXPERT_EFFICIENCY['float32']:.0%}. Kernels reach "
    f"{_MEMORY_EFFICIENCY:.0%} of the memory bandwidth and {_CACHE_EFFICIENCY:.0%} of the L2 bandwidth. Of the latter, "
    f"atomic additions reach {_ATOMIC_EFFICIENCY:.0%} and gathered rows {_GATHER_EFFICIENCY:.0%}. In float32 fewer "
    f"than {_NARROWEST['float32']} neurons take as long as {_NARROWEST['float32']}. All these numbers were set to meet "
    "times on one H100, and are the same for other devices.",
    f"Ours takes the way that is fastest with {_USUAL_SHARE:.0%} of the experts selected: both products expert by "
    "expert, or the second one densely (spread), or both densely with a mask between them (masked).",
    f"A kernel takes at least {_LAUNCH * 1e6:.0f} µs, as in a CUDA graph. The dense layer has one kernel per matrix "
    "and one for the activation, and so has ours if masked. Otherwise ours has one kernel with up to 16 tokens and "
    "five with more, and one or two for the output.",
    "The cache never limits the dense layer. Ours pays for padding to 16, 32, 64, ... neurons and to tiles of tokens, "
    "for gathered rows, for weights read again for every tile, and for adding up the experts' outputs in the cache or "
    "in memory.",
    "Tokens select experts independently, and all are equally likely. Scores are given: the router is not counted.",
)
"""The assumptions of the model, in words for users."""


@dataclass(frozen=True)
class LayerShape:
    """A feed-forward layer and its experts: width → hidden → width, experts of `size` neurons.

    Raises:
        UsageError: sizes below 1, or `size` does not divide `hidden`.
    """

    width: int
    hidden: int
    size: int
    gated: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.hidden, self.size) < 1:
            raise UsageError("A layer's width, hidden width and expert size must be at least 1.")
        if self.hidden % self.size:
            raise UsageError(
                f"Experts of {self.size} neurons do not divide a hidden width of {self.hidden}: "
                f"{self.hidden % self.size} neurons would be left over."
            )

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.hidden // self.size

    @property
    def matrices(self) -> int:
        """The number of weight matrices in the dense layer."""
        return 3 if self.gated else 2

    @property
    def weights(self) -> int:
        """The number of weights, which is also that of multiply-adds for one token if every expert runs."""
        return self.matrices * self.width * self.hidden


@dataclass(frozen=True)
class Estimate:
    """The seconds of one call. parts: the seconds that each thing alone would take. bound: the longest of them."""

    seconds: float
    bound: Bound
    parts: Mapping[Bound, float]

    @classmethod
    def of(
        cls, arithmetic: float, memory: float, cache: float, sums: float, launches: float, then: float = 0.0
    ) -> Estimate:
        """Make an estimate from seconds: the longest of the first three, plus sums, launches and what comes `then`."""
        parts: dict[Bound, float] = {
            "arithmetic": arithmetic + then, "memory": memory, "cache": cache, "sums": sums, "launches": launches,
        }  # fmt: skip
        seconds = max(arithmetic, memory, cache) + then + sums + launches
        return cls(seconds, max(parts, key=lambda part: parts[part]), parts)


@dataclass(frozen=True)
class Prediction:
    """The predicted times of the dense layer and of ours at one share, and the way that ours takes."""

    share: float
    dense: Estimate
    ours: Estimate
    way: Way

    @property
    def ratio(self) -> float:
        """Dense time / our time: above 1 if ours is faster."""
        return self.dense.seconds / self.ours.seconds


def predict(
    device: Device, layer: LayerShape, tokens: int, share: float, dtype: str = "bfloat16", *, way: Way | None = None
) -> Prediction:
    """Predict the time of one call on `tokens` tokens if each of them selects `share` of the experts.

    Args:
        way: None for `fastest_way`, which does not know `share`.

    Raises:
        UsageError: a dtype other than float32, bfloat16 and float16, fewer than 1 token, a share outside (0, 1].
    """
    if dtype not in _BYTES:
        raise UsageError(f"No model of {dtype}. There are: {', '.join(_BYTES)}.")
    if tokens < 1 or not 0.0 < share <= 1.0:
        raise UsageError(
            f"There is no prediction for {tokens} tokens that select {share:g} of the experts. Give at least 1 token, "
            "and a share above 0 and at most 1."
        )
    way = way or fastest_way(device, layer, tokens, dtype)
    ours = _WAYS[way](device, layer, tokens, share, dtype)
    return Prediction(share, _dense(device, layer, tokens, dtype), ours, way)


def fastest_way(
    device: Device, layer: LayerShape, tokens: int, dtype: str = "bfloat16", share: float = _USUAL_SHARE
) -> Way:
    """Return the way that should be fastest at a share. Of equally fast ways it is the one that computes least.

    Raises:
        UsageError: as `predict`.
    """
    return min(_WAYS, key=lambda way: predict(device, layer, tokens, share, dtype, way=way).ours.seconds)


def break_even(device: Device, layer: LayerShape, tokens: int, dtype: str = "bfloat16") -> float:
    """Return the share of experts up to which ours should not be slower than dense: 0.0 for never, 1.0 for always."""

    def gains(share: float) -> bool:
        return predict(device, layer, tokens, share, dtype).ratio >= 1.0

    low, high = 1e-6, 1.0
    if gains(high):
        return 1.0
    if not gains(low):
        return 0.0
    while high - low > 1e-4:  # ours takes longer if more is selected
        middle = (low + high) / 2
        low, high = (middle, high) if gains(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Choice:
    """The fastest size of experts, None if dense is fastest, and the prediction for every candidate size."""

    size: int | None
    predictions: Mapping[int, Prediction]


def best_size(
    device: Device,
    width: int,
    hidden: int,
    tokens: int,
    share: float | Mapping[int, float],
    dtype: str = "bfloat16",
    *,
    sizes: Sequence[int] = (8, 16, 32, 64, 128, 256),
    gated: bool = False,
) -> Choice:
    """Find the size of experts with which a call should be fastest.

    Args:
        share: the share of the experts that are selected, or one for each size. At equal quality it differs: smaller
            experts need a smaller share.
        sizes: the candidates; those that do not divide `hidden` are left out. Of equally fast ones the larger is taken.

    Raises:
        UsageError: none of them divides `hidden`, or as `predict`.
    """
    candidates = sorted((size for size in sizes if hidden % size == 0), reverse=True)
    if not candidates:
        raise UsageError(f"None of the sizes {', '.join(map(str, sizes))} divides a hidden width of {hidden}.")
    predictions = {
        size: predict(
            device,
            LayerShape(width, hidden, size, gated),
            tokens,
            share if isinstance(share, float | int) else share[size],
            dtype,
        )
        for size in candidates
    }
    best = min(candidates, key=lambda size: predictions[size].ours.seconds)
    return Choice(best if predictions[best].ratio >= 1.0 else None, predictions)


def _dense(device: Device, layer: LayerShape, tokens: int, dtype: str) -> Estimate:
    size = _BYTES[dtype]
    arithmetic = 2 * tokens * layer.weights / (device.rates[dtype] * _DENSE_EFFICIENCY)
    between = 2 * (layer.matrices - 1) * tokens * layer.hidden * size  # hidden values, written and read
    traffic = (layer.weights + 2 * tokens * layer.width) * size + between * _misses(device, between / 2)
    return Estimate.of(arithmetic, _memory(device, traffic), 0.0, 0.0, (layer.matrices + 1) * _LAUNCH)


def _experts(device: Device, layer: LayerShape, tokens: int, share: float, dtype: str) -> Estimate:
    size = _BYTES[dtype]
    pairs = tokens * layer.experts * share
    used, tiles, rows = _work(device, layer, tokens, share, dtype)
    decodes = tokens <= _FEW_TOKENS
    arithmetic = 2 * tiles * rows * layer.matrices * layer.width * _padded(layer.size, tokens, dtype)
    output = tokens * layer.width * _SCORE
    atomic = decodes or 2 * output <= device.cache_size
    apart = not decodes and not (atomic and layer.size <= _most_fused(device, layer.gated, dtype))
    between = 2 * pairs * layer.size * size if apart else 0  # two kernels, with the hidden values in memory
    gathered = pairs * layer.width * size * (_blocks(layer) if apart else 1)
    converted = output + tokens * layer.width * size if size < _SCORE else 0
    summed = output + converted if atomic else 0
    selection = (tokens * layer.experts + (0 if decodes else 2 * pairs)) * _SCORE
    traffic = (layer.weights * used + tokens * layer.width) * size + selection
    traffic += between * _misses(device, between / 2)
    traffic += gathered * _misses(device, tokens * layer.width * size)
    traffic += summed * _misses(device, output)
    traffic += tokens * layer.width * min(size, _SCORE)  # the result
    cached = tiles * layer.matrices * layer.size * layer.width * size  # weights, once a tile
    cached += between + summed + selection
    if atomic:
        sums = pairs * layer.width * _SCORE / (device.cache * _ATOMIC_EFFICIENCY)
    else:
        sums = 2 * pairs * layer.width * size / (device.memory * _PARTIAL_EFFICIENCY)
    # The output is filled before, and converted after, or added up.
    launches = 1 + apart + (0 if decodes else _PLAN_LAUNCHES) + (1 + (size < _SCORE) if atomic else 1)
    return Estimate.of(
        arithmetic / (device.rates[dtype] * _EXPERT_EFFICIENCY[dtype]),
        _memory(device, traffic),
        cached / (device.cache * _CACHE_EFFICIENCY) + gathered / (device.cache * _GATHER_EFFICIENCY),
        sums,
        launches * _LAUNCH,
    )


def _spread(device: Device, layer: LayerShape, tokens: int, share: float, dtype: str) -> Estimate:
    size = _BYTES[dtype]
    pairs, matrices = tokens * layer.experts * share, layer.matrices - 1
    used, tiles, rows = _work(device, layer, tokens, share, dtype, few=False)
    arithmetic = 2 * tiles * rows * matrices * layer.width * _padded(layer.size, tokens, dtype, few=False)
    hidden = tokens * layer.hidden * size
    between = (2 + share) * hidden  # filled with zeros, written where something runs, and read
    gathered = pairs * layer.width * size * _blocks(layer)
    selection = (tokens * layer.experts + 2 * pairs) * _SCORE
    weights = layer.width * layer.hidden * (matrices * used + 1)
    traffic = (weights + 2 * tokens * layer.width) * size + selection
    traffic += between * _misses(device, hidden) + gathered * _misses(device, tokens * layer.width * size)
    cached = tiles * matrices * layer.size * layer.width * size + between + selection
    return Estimate.of(
        arithmetic / (device.rates[dtype] * _EXPERT_EFFICIENCY[dtype]),
        _memory(device, traffic),
        cached / (device.cache * _CACHE_EFFICIENCY) + gathered / (device.cache * _GATHER_EFFICIENCY),
        0.0,
        (_PLAN_LAUNCHES + 3) * _LAUNCH,
        then=2 * tokens * layer.width * layer.hidden / (device.rates[dtype] * _DENSE_EFFICIENCY),
    )


def _masked(device: Device, layer: LayerShape, tokens: int, share: float, dtype: str) -> Estimate:
    """The dense layer, whose activation goes through the hidden values once more than in its own estimate."""
    dense = _dense(device, layer, tokens, dtype)
    hidden = tokens * layer.hidden * _BYTES[dtype]
    read = share * (layer.matrices - 1) * hidden
    traffic = (hidden + read) * _misses(device, hidden) + tokens * layer.experts * _SCORE
    # This is a kernel of its own: nothing else runs at the same time.
    return Estimate.of(
        dense.parts["arithmetic"], dense.parts["memory"], 0.0, _memory(device, traffic), dense.parts["launches"]
    )


_WAYS: Mapping[Way, Callable[[Device, LayerShape, int, float, str], Estimate]] = {
    "experts": _experts,
    "spread": _spread,
    "masked": _masked,
}
"""All ways, from the one that computes least to the one that computes most."""


def _work(
    device: Device, layer: LayerShape, tokens: int, share: float, dtype: str, *, few: bool = True
) -> tuple[float, float, int]:
    """The share of the experts that any token selects, the number of tiles of their tokens, and the rows of a tile."""
    used = 1.0 - (1.0 - share) ** tokens
    rows = _rows(device, tokens, dtype, few=few)
    # About half of every expert's last tile is empty. An expert that runs for every token has a known number of tiles.
    tiles = layer.experts * min(max(used, tokens * share / rows + used / 2), math.ceil(tokens / rows))
    return used, tiles, rows


def _blocks(layer: LayerShape) -> int:
    """How often rows of x are read for an expert: its neurons may take several tiles, half as wide if gated."""
    return math.ceil(layer.size / (_WIDEST // (layer.matrices - 1)))


def _memory(device: Device, traffic: float) -> float:
    return traffic / (device.memory * _MEMORY_EFFICIENCY)


def _misses(device: Device, held: float) -> float:
    """The share of accesses to a tensor of `held` bytes that go to memory: what half of the cache cannot hold."""
    return max(0.0, 1.0 - device.cache_size / 2 / held) if held else 0.0


def _rows(device: Device, tokens: int, dtype: str, *, few: bool = True) -> int:
    """Tokens in a tile, as in `surgeon.kernels.triton.tiles`. `few`: a single token is multiplied without tiles."""
    if tokens == 1 and few:
        return 1
    most = device.rows if dtype != "float32" or device.hopper else device.rows // 2
    wanted = math.ceil(tokens / 4)
    return int(min(most, max(16, 1 << (wanted - 1).bit_length())))


def _most_fused(device: Device, gated: bool, dtype: str) -> int:
    """The most neurons of an expert that one fused kernel computes, as in `surgeon.kernels.triton.tiles`."""
    if dtype == "float32":
        return 0 if device.hopper else _WIDEST // (4 if gated else 2)
    return _WIDEST // (2 if gated else 1)


def _padded(size: int, tokens: int, dtype: str, *, few: bool = True) -> int:
    """Neurons computed for an expert, as in `surgeon.kernels.triton.tiles`. `few`: few tokens have their own tiles."""
    if tokens == 1 and few:
        return size
    few = few and tokens <= _FEW_TOKENS
    if few or size > _WIDEST:
        step = 16 if few else _WIDEST
        return math.ceil(size / step) * step
    return max(_NARROWEST[dtype], 1 << (size - 1).bit_length())
