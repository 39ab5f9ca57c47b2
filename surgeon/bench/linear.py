"""Time linear layers that read only the inputs that matter against dense ones, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.bench.layer import DTYPES
from surgeon.bench.machine import Machine
from surgeon.bench.timing import TimedCall, median_seconds
from surgeon.display.choose import shows_progress
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.kernels.sparse_linear import kept, masked_linear, sparse_linear
from surgeon.progress import Progress, ShowProgress

Method = Literal["dense", "compiled", "ours"]
METHODS: tuple[Method, ...] = get_args(Method)
WEIGHTS = {**DTYPES, "int8": torch.int8}
"""The dtypes of weights. Those in int8 have inputs in float32, and so does the dense layer beside them."""

_LAYERS = 8  # in a call
_QUANTILES = 257


@dataclass(frozen=True)
class LinearCase:
    """A layer of d_in inputs, of which every token keeps about `share`. dtype: a name of `WEIGHTS`."""

    d_in: int
    d_out: int
    dtype: str
    tokens: int
    share: float


@dataclass(frozen=True)
class LinearCell:
    """The times of one layer.

    kept: share of the inputs that a token keeps; rows: share that some token of the call keeps, whose weights are
    read. warm: milliseconds of each method with weights in the caches; cold: with weights that are not in a cache.
    warm_gain, cold_gain: the faster of the dense layers, eager and compiled, over ours. error: the largest difference
    of ours from float64, relative to the largest output.
    """

    d_in: int
    d_out: int
    dtype: str
    tokens: int
    share: float
    kept: float
    rows: float
    warm: Mapping[str, float]
    cold: Mapping[str, float]
    warm_gain: float
    cold_gain: float
    error: float


@shows_progress
def time_linear(
    cases: Sequence[LinearCase],
    machine: Machine,
    *,
    seconds: float,
    progress: ShowProgress = None,
) -> list[LinearCell]:
    """Time every method on every case. seconds: average time spent on each method, case and state of the caches."""
    cells = []
    if callable(progress):
        progress(Progress("bench", 0, 0))
    with torch.inference_mode(), using_threads(machine.threads):
        for number, case in enumerate(cases):
            cells.append(_time(_Problem(case, torch.device(machine.device)), machine, seconds))
            if callable(progress):
                progress(Progress("bench", number + 1, len(cases)))
    return cells


class _Problem:
    """The arguments of some layers: one for each call of a round, and one more.

    Every layer has inputs of its own, as a compiler would join those that share them.
    """

    def __init__(self, case: LinearCase, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        weights = WEIGHTS[case.dtype]
        dtype = torch.float32 if weights == torch.int8 else weights

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        self.x = [draw(case.tokens, case.d_in).to(device, dtype) for _ in range(_LAYERS + 1)]
        self.bias = draw(case.d_out).to(device, dtype)
        dense = [draw(case.d_in, case.d_out) * case.d_in**-0.5 for _ in range(_LAYERS + 1)]
        self.w_scale: Tensor | None = None
        if weights == torch.int8:
            self.w_scale = torch.full((case.d_out,), max(float(w.abs().max()) for w in dense) / 127, device=device)
            self.rows = [(w / self.w_scale[0].cpu()).round().to(device, weights) for w in dense]
            self.dense = [(rows * self.w_scale).t().contiguous() for rows in self.rows]
        else:
            self.rows = [w.to(device, dtype) for w in dense]
            self.dense = [rows.t().contiguous() for rows in self.rows]
        scores = torch.cat(self.x).float().abs().flatten()
        places = torch.linspace(0, 1, _QUANTILES, device=device)
        self.levels = torch.stack([scores.kthvalue(1 + int(p * (len(scores) - 1))).values for p in places.tolist()])
        self.levels[0] = 0.0
        self.tau = torch.tensor(1.0 - case.share, device=device)

    def call(self, method: Method, layers: Sequence[int]) -> Callable[[], object]:
        """A call of the layers, one after the other."""
        if method == "ours":
            return lambda: [self.ours(number) for number in layers]
        model = _Dense([self.dense[number] for number in layers], self.bias)
        inputs = [self.x[place] for place in range(len(layers))]
        if method == "dense":
            return lambda: model(inputs)
        with torch._inductor.config.patch(freezing=True):
            compiled = torch.compile(model.eval(), dynamic=False, fullgraph=True)
            compiled(inputs)
        return lambda: compiled(inputs)

    def ours(self, number: int) -> Tensor:
        y: Tensor = sparse_linear(
            self.x[number], self.rows[number], self.bias, None, None, self.levels, self.tau, self.w_scale
        )
        return y

    @cached_property
    def masks(self) -> list[Tensor]:
        """Which inputs every token keeps, for each layer of a round."""
        return [kept(x, None, None, self.levels, self.tau) for x in self.x[:_LAYERS]]

    def error(self) -> float:
        wide = self.x[0].double(), self.dense[0].double(), self.bias.double()
        exact = masked_linear(*wide, None, None, self.levels, self.tau)
        return float((self.ours(0).double() - exact).abs().max() / exact.abs().max())


class _Dense(nn.Module):
    def __init__(self, weights: Iterable[Tensor], bias: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [F.linear(x, weight, self.bias) for x, weight in zip(inputs, self.weights, strict=True)]


def _time(problem: _Problem, machine: Machine, seconds: float) -> LinearCell:
    """Time calls of one layer several times, and of several layers after the caches were emptied."""
    case, device = problem.case, problem.device
    torch.compiler.reset()  # it compiles no function for more than a few sizes
    every, spare = list(range(_LAYERS)), [_LAYERS] * _LAYERS
    found: dict[str, dict[str, float]] = {}
    calls = {method: (problem.call(method, spare), problem.call(method, every)) for method in METHODS}
    for state in ("warm", "cold"):
        timed: dict[str, TimedCall] = {}
        for method, (again, others) in calls.items():
            # What is not timed brings code into the caches, and for "warm" the weights as well.
            again(), others()
            timed[method] = TimedCall(again if state == "warm" else others, first=again)
        times = median_seconds(timed, device, seconds=seconds, threads=machine.threads, early=False)
        found[state] = {method: 1000 * taken / _LAYERS for method, taken in times.items()}
    masks = torch.stack(problem.masks).float()
    return LinearCell(
        **vars(case),
        kept=float(masks.mean()),
        rows=float(masks.amax(1).mean()),
        warm=found["warm"],
        cold=found["cold"],
        warm_gain=_gain(found["warm"]),
        cold_gain=_gain(found["cold"]),
        error=problem.error(),
    )


def _gain(times: Mapping[str, float]) -> float:
    return min(times["dense"], times["compiled"]) / times["ours"]
