"""Compare the kernels with `masked_ffn` in float64, in Triton's interpreter or on a GPU.

On the CPU it is for a process that set TRITON_INTERPRET=1 before it imported triton. The kernels are looked up at every
call, so that `mutants` can put broken ones in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.dynamic_k import masked_ffn, selected
from surgeon.kernels.experts import Experts

PACKAGE = "surgeon.kernels.triton"
# Largest error over largest value. The interpreter truncates to bf16, which doubles its error.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
# What is summed is of the order of 1. Where all of it cancels, as it may in one number, the error is still that of it.
CANCELLED = 0.2


def module(name: str) -> Any:
    """A module of the package of kernels."""
    return import_module(f"{PACKAGE}.{name}")


@dataclass(frozen=True)
class Case:
    """Random arguments and how to compute with them.

    Attributes:
        way: "fused", "split", "ordered", "spread" or "masked"; up to 16 tokens are decoded if it is "fused" or "split".
        tile: neurons, depth and columns of every tile, so that small sizes take several.
        rows: of a tile.
        programs: how many share out the tiles.
        levels: if given, scores take this many values and so do thresholds: ties.
        share: of pairs that run, about; exactly none for 0 and all for 1.
        room: bytes for what pairs give, if not as many as usual: then "ordered" goes through ranges of 16 columns.
        device: where the arguments are.
    """

    tokens: int = 40
    experts: int = 5
    neurons: int = 20
    d_in: int = 21
    d_out: int = 37
    gated: bool = False
    bias: tuple[bool, bool, bool] = (True, True, True)  # b1, b_gate, b2
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    score_dtype: torch.dtype = torch.float32
    levels: int | None = None
    share: float = 0.4
    way: str = "fused"
    tile: int = 16
    rows: int = 16
    programs: int = 3
    seed: int = 0
    room: int | None = None
    device: str = "cpu"

    @property
    def how(self) -> dict[str, Any]:
        """Its way, for `forward` and `backward`."""
        return {"way": self.way if self.way in ("spread", "masked") else "experts", "ordered": self.way == "ordered"}

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Experts, Tensor | None]:
        """x, scores, threshold, experts, b2."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(*shape, generator=generator) * scale).to(self.dtype)
            return _between_nan(values.to(self.device))

        up, down = (self.experts, self.neurons, self.d_in), (self.experts, self.neurons, self.d_out)
        b1, b_gate, b2 = self.bias
        experts = Experts(
            draw(*up, scale=self.d_in**-0.5),
            draw(*up[:2]) if b1 else None,
            draw(*up, scale=self.d_in**-0.5) if self.gated else None,
            draw(*up[:2]) if self.gated and b_gate else None,
            draw(*down, scale=self.neurons**-0.5),
        )
        scores = torch.rand(self.tokens, self.experts, generator=generator)
        threshold = torch.full((self.tokens,), 1 - self.share if self.share else 2.0)
        if self.levels:
            # In double precision a third is not what it is in single precision: to one of the two it is no tie.
            scores = (scores * self.levels).floor().double() / self.levels
            threshold = (torch.rand(self.tokens, generator=generator) * self.levels).floor() / self.levels
        x = draw(self.tokens, self.d_in)
        scores = _between_nan(scores.to(self.device, self.score_dtype))
        threshold = _between_nan(threshold.to(self.device))
        return x, scores, threshold, experts, draw(self.d_out) if b2 else None


def _between_nan(tensor: Tensor) -> Tensor:
    """The same values with NaN before and behind them in memory: whoever reads past the end will show it."""
    margin = 64
    memory = tensor.new_full((tensor.numel() + 2 * margin,), float("nan"))
    memory[margin:-margin] = tensor.flatten()
    return memory[margin:-margin].view(tensor.shape)


@contextmanager
def forced(case: Case) -> Iterator[None]:
    """The way and tile sizes of a case."""
    tiles, plan = module("tiles"), module("plan")
    small = tiles.Tiles(case.rows, case.tile, case.tile, case.tile, 4, 2)
    whole = small._replace(neurons=tiles._padded(case.neurons, 1024))
    with ExitStack() as stack:
        names = ("hidden", "combine", "mask", "grad_weight")
        sizes = {name: lambda *_, **__: small for name in names}
        decoding = small._replace(rows=16, neurons=16 if case.tokens > 1 else 4)
        sizes |= {"fused": lambda *_, **__: whole, "decode": lambda *_, **__: decoding}
        ways = {
            "rows": lambda *_: case.rows,
            "fuses": lambda *_, **__: case.way == "fused",
            "adds_atomically": lambda *_: case.way != "ordered",
            "programs": lambda *_: case.programs,
        }
        stack.enter_context(patch.multiple(tiles, **sizes, **ways))
        stack.enter_context(patch.multiple(plan, _SCORES=256, _BLOCKS=2, _SCAN=16))
        if case.room is not None:
            stack.enter_context(patch.multiple(module("host"), PARTIAL_BYTES=case.room, _LEAST_COLUMNS=16))
        yield


def reference(
    x: Tensor, scores: Tensor, threshold: Tensor, experts: Experts, b2: Tensor | None, activation: str
) -> Tensor:
    """The output, in float64."""
    w1, b1, gate, b_gate, w2 = (None if t is None else t.double() for t in experts)
    return masked_ffn(
        x.double(), scores, threshold, w1, b1, gate, b_gate, w2, None if b2 is None else b2.double(), activation
    )


def reference_gradients(
    grad: Tensor, x: Tensor, scores: Tensor, threshold: Tensor, experts: Experts, b2: Tensor | None, activation: str
) -> dict[str, Tensor]:
    """The gradients of x and of every weight there is, by name, in float64."""
    leaves = {name: t.double().requires_grad_() for name, t in {"x": x, **experts._asdict()}.items() if t is not None}
    wide = Experts(*(leaves.get(name) for name in Experts._fields))  # type: ignore[arg-type]
    output = reference(leaves["x"], scores, threshold, wide, b2, activation)
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad.double()), strict=True))


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    found, expected = found.detach(), expected.detach()
    assert found.dtype == dtype, name
    assert found.shape == expected.shape, name
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=0,
        atol=TOLERANCE[dtype] * max(CANCELLED, float(expected.nan_to_num(0.0).abs().max())) if expected.numel() else 0,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )


def check_forward(case: Case) -> None:
    arguments = case.arguments()
    assert module("backend").supports(arguments[0], arguments[3], case.activation) is None
    with forced(case):
        found = module("host").forward(*arguments, case.activation, **case.how)
    assert found.is_contiguous()
    assert_close(found, reference(*arguments, case.activation), case.dtype, "output")


def check_nan(case: Case, where: str) -> None:
    """A NaN in `where`, one of x, scores and threshold: it makes every expert run, and stays in its row."""
    x, scores, threshold, experts, b2 = case.arguments()
    row = case.tokens // 2
    {"x": x, "scores": scores, "threshold": threshold}[where][row] = float("nan")
    if where == "x":
        scores[row] = 1.0
    arguments = x, scores, threshold, experts, b2, case.activation
    with forced(case):
        found = module("host").forward(*arguments, **case.how)
    assert found[row].isnan().all() == (where == "x")
    assert_close(found, reference(*arguments), case.dtype, "output")


def check_activation(name: str, device: str = "cpu") -> None:
    """An activation and its gradient, at NaN and large values too."""
    elementwise, launch = module("elementwise"), module("launch")

    @triton.jit  # type: ignore[untyped-decorator]
    def both(z, grad, a, g, name: tl.constexpr, activate: tl.constexpr, backward: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, 64)
        tl.store(a + i, activate(tl.load(z + i), name))
        tl.store(g + i, backward(tl.load(grad + i), tl.load(z + i), name))

    z = torch.cat([torch.linspace(-12, 12, 59), torch.tensor([0.0, -0.0, float("nan"), 80.0, -80.0])])
    z, grad = z.to(device), torch.linspace(-1, 2, 64, device=device)
    a, g = torch.empty(64, device=device), torch.empty(64, device=device)
    functions = {"activate": elementwise.activate, "backward": elementwise.activate_backward}
    launch.launch(both, (1,), z, grad, a, g, name=name, **functions, warps=4, stages=1)
    assert name in elementwise.ACTIVATIONS
    theirs = ACTIVATIONS[name]
    torch.testing.assert_close(a.double(), theirs.fn(z.double()), rtol=2e-6, atol=1e-6, equal_nan=True)
    expected = theirs.backward(grad.double(), z.double())
    torch.testing.assert_close(g.double(), expected, rtol=2e-6, atol=4e-6, equal_nan=True)


def check_backward(case: Case) -> None:
    """The gradients of x and of every weight there is."""
    x, scores, threshold, experts, b2 = case.arguments()
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = _between_nan(torch.randn(case.tokens, case.d_out, generator=generator).to(case.device, case.dtype))
    expected = reference_gradients(grad, x, scores, threshold, experts, b2, case.activation)
    with forced(case):
        found = module("host").backward(grad, x, scores, threshold, experts, case.activation, **case.how)
    for name, gradient in found._asdict().items():
        if name in expected:
            assert_close(gradient, expected[name], case.dtype, f"gradient of {name}")
        else:
            assert gradient is None


def check_thresholds(scores: Tensor, tau: float, rule: str) -> None:
    """Those of every row, exactly: of scores whose sums are exact, or that `top_k` only counts."""
    share = torch.tensor(tau, device=scores.device)
    found = module("host").sorted_threshold(scores, share, rule)
    expected = torch.ops.surgeon.sorted_threshold_torch(scores, share, rule)
    assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def check_plan(case: Case) -> None:
    """The plan, exactly."""
    _, scores, threshold, *_ = case.arguments()
    with forced(case):
        made = module("plan").plan(scores, threshold, case.rows, slot_of_pair=True)
    mask = selected(scores, threshold)
    expert, token = mask.t().nonzero().unbind(1)
    counts = mask.sum(0).cpu()
    tiles = (counts + case.rows - 1) // case.rows
    zero = torch.zeros(1, dtype=torch.int64)
    assert made.start.tolist() == torch.cat([zero, counts.cumsum(0)]).tolist()
    assert made.first_tile.tolist() == torch.cat([zero, tiles.cumsum(0)]).tolist()
    assert made.token_of_slot[: len(token)].tolist() == token.tolist()
    expert_of_tile = torch.arange(case.experts).repeat_interleave(tiles)
    assert made.expert_of_tile[: len(expert_of_tile)].tolist() == expert_of_tile.tolist()
    slots = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    slots[token, expert] = torch.arange(len(token), dtype=torch.int32, device=mask.device)
    assert torch.equal(made.slot_of_pair, slots)
