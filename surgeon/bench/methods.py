"""The methods to compute a feed-forward layer that are compared.

Methods that skip experts start from scores and thresholds, as the operator does. Each method gets the layout of the
weights that suits it, which is made before anything is timed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.bench.engines import ENGINES
from surgeon.bench.layer import Problem
from surgeon.bench.method import Method, UnavailableError, dense_ffn
from surgeon.kernels import cpu
from surgeon.kernels.activations import Activation, activation
from surgeon.kernels.cpu.crossover import taking
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn, selected
from surgeon.kernels.int8 import route, routed_ffn_int8
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import Int8Experts, pack, quantise_trunk


def _dense(problem: Problem, run: Callable[..., Tensor] = dense_ffn) -> Callable[[], Tensor]:
    flat = problem.experts.flat()
    x, act, w2 = problem.x, _activation(problem).fn, flat.w2.t().contiguous()
    return lambda: run(x, flat.w1, flat.b1, flat.gate, flat.b_gate, w2, problem.b2, act)


def _compiled(problem: Problem) -> Callable[[], Tensor]:
    return _dense(problem, torch.compile(dense_ffn, dynamic=False, fullgraph=True))


def _masked(problem: Problem) -> Callable[[], Tensor]:
    return lambda: masked_ffn(*_arguments(problem))


def _loop(problem: Problem) -> Callable[[], Tensor]:
    """Run the experts in sequence: gather the tokens, compute two products, and add the rows."""
    x, act = problem.x, _activation(problem)
    each = [problem.experts.one(number) for number in range(len(problem.experts.w1))]

    def call() -> Tensor:
        mask = _mask(problem)
        rows_of = torch.split(mask.t().nonzero()[:, 1], mask.sum(0).tolist())
        out = problem.b2.repeat(len(x), 1)
        for expert, rows in zip(each, rows_of, strict=True):
            if len(rows):
                inputs = x.index_select(0, rows)
                h = F.linear(inputs, expert.w1, expert.b1)
                h = act.fn(h) if expert.gate is None else act.fn(F.linear(inputs, expert.gate, expert.b_gate)) * h
                out.index_add_(0, rows, torch.mm(h, expert.w2))
        return out

    return call


def _grouped_mm(problem: Problem) -> Callable[[], Tensor]:
    """Compute each product for all experts in one call, over tokens sorted by expert."""
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
    x, experts, act = problem.x, problem.experts, _activation(problem)
    w1 = experts.w1.transpose(1, 2)
    gate = None if experts.gate is None else experts.gate.transpose(1, 2)

    def call() -> Tensor:
        mask = _mask(problem)
        ends = mask.sum(0).cumsum(0).to(torch.int32)
        expert, token = mask.t().nonzero(as_tuple=True)
        inputs = x.index_select(0, token)
        h = product(inputs, w1, offs=ends)
        if experts.b1 is not None:
            h += experts.b1[expert]
        if gate is None:
            h = act.fn(h)
        else:
            gates = product(inputs, gate, offs=ends)
            if experts.b_gate is not None:
                gates += experts.b_gate[expert]
            h = act.fn(gates) * h
        return problem.b2.repeat(len(x), 1).index_add_(0, token, product(h, experts.w2, offs=ends))

    return call


def _published(problem: Problem) -> Callable[[], Tensor]:
    """The steps of D2DMoE's published kernels, in plain torch.

    Tokens are sorted by expert. The first product is written to a buffer [E, N, s]. The second is added to the output
    row by row.
    """
    x, experts, act = problem.x, problem.experts, _activation(problem)
    if experts.gate is not None:
        raise UnavailableError("the published method has no gated layers")
    w1 = experts.w1.transpose(1, 2).contiguous()  # [E, d, s], as in the published kernels
    count, neurons, _ = experts.w1.shape

    def call() -> Tensor:
        mask = _mask(problem)
        order = mask.to(torch.int32).argsort(dim=0, descending=True)
        counts = mask.sum(0).tolist()
        buffer = x.new_empty(count, len(x), neurons)
        for expert, tokens in enumerate(counts):
            if tokens:
                h = torch.mm(x[order[:tokens, expert]], w1[expert])
                buffer[expert, :tokens] = act.fn(h if experts.b1 is None else h + experts.b1[expert])
        out = torch.zeros_like(x)
        for expert, tokens in enumerate(counts):
            if tokens:
                out.index_add_(0, order[:tokens, expert], torch.mm(buffer[expert, :tokens], experts.w2[expert]))
        return out + problem.b2

    return call


def _torch(problem: Problem) -> Callable[[], Tensor]:
    return lambda: torch.ops.surgeon.dynamic_k_ffn_torch(*_arguments(problem))


def _ours(problem: Problem) -> Callable[[], Tensor]:
    return lambda: dynamic_k_ffn(*_arguments(problem))


def _ours_dense(problem: Problem) -> Callable[[], Tensor]:
    x, scores, _, *rest = _arguments(problem)
    everything = torch.full_like(problem.threshold, float("-inf"))
    return lambda: dynamic_k_ffn(x, scores, everything, *rest)


# The router of `_int8_call` takes this share of the multiply-adds that it routes, with a width within limits, as those
# that `moeify` makes.
_ROUTER_SHARE, _ROUTER_WIDTHS = 0.025, (8, 128)


_GROUP = 32  # inputs with a factor of their own, of weights of 4 bits


def _int8_call(problem: Problem, group: int | None = None, float8: bool = False) -> Int8Call:
    """The problem with 8-bit weights and a router with random weights, which selects as many experts of every token.

    group, float8: as in `Int8Experts.of`.
    """
    shape, device = problem.case.shape, problem.x.device
    if device.type not in ("cpu", "cuda"):
        raise UnavailableError("there are kernels for 8-bit weights for CPUs and for NVIDIA's and AMD's GPUs only")
    if problem.case.mask != "uniform":
        raise UnavailableError("its own router selects the experts, about uniformly")
    generator = torch.Generator().manual_seed(shape.width)
    least, most = _ROUTER_WIDTHS
    width = min(max(round(_ROUTER_SHARE * shape.weights / (shape.width + shape.experts)), least), most)

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) / math.sqrt(sizes[-1])).to(device)

    tau = torch.tensor(1 - problem.case.share, device=device)
    fc1, fc1_scale = quantise_trunk(draw(width, shape.width))
    return Int8Call(
        problem.x, tau, "top_k", 0, None, pack(fc1), fc1_scale, None,
        draw(shape.experts, width), None, "relu", "abs", b2=problem.b2.float(), activation=problem.case.activation,
        **Int8Experts.of(problem.experts, group=group, float8=float8)._asdict(),
    )  # fmt: skip


def _ours_int8(problem: Problem, group: int | None = None, float8: bool = False) -> Callable[[], Tensor]:
    call = _int8_call(problem, group, float8)

    def run() -> Tensor:
        y: Tensor = routed_ffn_int8(*call)
        return y

    return run


def _int8_mask(problem: Problem) -> Tensor:
    scores, threshold = route(_int8_call(problem))
    return selected(scores, threshold)


@contextmanager
def _never_dense(problem: Problem) -> Iterator[None]:
    """Make the kernels run expert by expert, even where the dense product is known to be faster."""
    if problem.x.device.type != "cpu":
        with _kernels_on_gpu():
            yield
        return
    with taking("kernels") if cpu.ready() else nullcontext():
        yield


@contextmanager
def _kernels_on_gpu() -> Iterator[None]:
    before = os.environ.get("SURGEON_GPU")
    if before != "torch":
        os.environ["SURGEON_GPU"] = "triton"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SURGEON_GPU"]
        else:
            os.environ["SURGEON_GPU"] = before


METHODS: dict[str, Method] = {
    "dense": Method("the dense layer", _dense, every=True),
    "compiled": Method("the dense layer by torch.compile", _compiled, every=True),
    "masked": Method("every expert, with those not selected masked", _masked),
    "loop": Method("experts in sequence: gather, two products, index_add_", _loop, waits=True),
    "grouped_mm": Method("torch's grouped_mm over tokens sorted by expert", _grouped_mm, waits=True),
    "published": Method("the steps of the kernels published with D2DMoE, in plain torch", _published, waits=True),
    "torch": Method("the torch backend", _torch, waits=True),
    "ours": Method("the operator", _ours),
    "ours_dense": Method(
        "the operator with every expert on, without the dense product", _ours_dense, True, _never_dense
    ),
    "ours_int8": Method(
        "the operator with 8-bit weights, its router and the selection included", _ours_int8, mask=_int8_mask
    ),
    "ours_int4": Method(
        f"the same with 4-bit weights in groups of {_GROUP}", partial(_ours_int8, group=_GROUP), mask=_int8_mask
    ),
    "ours_fp8": Method("the same with float8 weights", partial(_ours_int8, float8=True), mask=_int8_mask),
    **ENGINES,
}
"""Name → method, in the order in which they are shown."""


def _arguments(problem: Problem) -> tuple[Tensor | str | None, ...]:
    return (
        problem.x, problem.scores, problem.threshold, *problem.experts, problem.b2, problem.case.activation,
    )  # fmt: skip


def _mask(problem: Problem) -> Tensor:
    return selected(problem.scores, problem.threshold)


def _activation(problem: Problem) -> Activation:
    return activation(problem.case.activation)
