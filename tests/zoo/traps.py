"""Places that look like an FFN and are none, each beside a real one: `trap` must stay, `ffn` is required.

What is refused here is refused because converting it would change the outputs, or would need more than the weights of
two or three linears. Where a product finds an exact conversion after all, the case says so with `certain=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from .body import DOWN, HIDDEN, SITES, TOKENS, UP, WIDTH, Block, Body, Stack, randomize, sequence, weight
from .case import Case, Registry, Trap

CASES = Registry("trap")
PAIR = {"up": UP, "down": DOWN}


def _ffn() -> nn.Module:
    return Body(lambda m, x: m.down(F.gelu(m.up(x))), up=UP, down=DOWN)


def trap(
    why: str, *, certain: bool = True, tolerance: float = 1e-4, registry: Registry = CASES, **parts: Any
) -> Callable[..., Any]:
    """Register the decorated function `(module, x) -> y` as a trap, `why` saying what makes it one.

    With `certain=False` it may also be converted, and only the outputs are compared.
    """

    def register(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build() -> nn.Module:
            blocks = [Block(ffn=_ffn(), trap=Body(forward, **parts)) for _ in SITES]
            return randomize(Stack(*blocks)).eval()

        registry.add(
            Case(
                name=forward.__name__,
                build=build,
                inputs=sequence,
                required=SITES,
                exact=certain,
                activation="gelu" if certain else None,
                gated=False if certain else None,
                traps=tuple(Trap(f"blocks.{i}.trap", why) for i in range(2)) if certain else (),
                tolerance=tolerance,
                note=why,
            )
        )
        return forward

    return register


# The hidden values are used outside -----------------------------------------------------------------------------------


@trap("the hidden values also feed a second head", **PAIR, aux=(HIDDEN, WIDTH))
def hidden_feeds_second_linear(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h) + m.aux(h)


@trap("the hidden values are added to the output", **PAIR)
def hidden_mean_added(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h) + h.mean(dim=-1, keepdim=True)


@trap("the values before the activation are used outside", **PAIR)
def preactivation_used(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.relu(h)) + h.sum(dim=-1, keepdim=True)


@trap("the values before an in-place activation are read after it", **PAIR)
def preactivation_overwritten_and_used(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    a = torch.relu_(h)
    return m.down(a) + h.sum(dim=-1, keepdim=True)


@trap("the output is scaled by the norm of the hidden values", **PAIR)
def hidden_norm_scales_output(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.up(x))
    return m.down(h) / (1 + h.norm(dim=-1, keepdim=True))


@trap("the hidden values are shaped by their own mean", **PAIR)
def hidden_minus_mean(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.up(x))
    return m.down(h - h.mean(dim=-1, keepdim=True))


@trap("the hidden values of a slice are used outside", **PAIR)
def hidden_slice_used(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h) + h[..., :WIDTH]


@trap("the gate is used outside", gate=UP, **PAIR)
def gate_used(m: Any, x: Tensor) -> Tensor:
    gate = F.silu(m.gate(x))
    return m.down(gate * m.up(x)) * gate.mean(dim=-1, keepdim=True)


# Attention, recurrence, mixtures --------------------------------------------------------------------------------------


@trap("additive attention, not an FFN", query=UP, key=UP, score=(HIDDEN, 1))
def additive_attention(m: Any, x: Tensor) -> Tensor:
    scores = m.score(torch.tanh(m.query(x).unsqueeze(2) + m.key(x).unsqueeze(1))).squeeze(-1)
    return torch.softmax(scores, dim=-1) @ x


@trap("attention, not an FFN", q=(WIDTH, WIDTH), k=(WIDTH, WIDTH), v=(WIDTH, WIDTH), o=(WIDTH, WIDTH))
def attention(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.softmax(m.q(x) @ m.k(x).mT / WIDTH**0.5, dim=-1) @ m.v(x))


@trap("attention with a gate on its output", q=(WIDTH, WIDTH), v=(WIDTH, WIDTH), gate=(WIDTH, WIDTH), o=(WIDTH, WIDTH))
def gated_attention(m: Any, x: Tensor) -> Tensor:
    q, v = m.q(x), m.v(x)
    return m.o(F.scaled_dot_product_attention(q, q, v) * torch.sigmoid(m.gate(x)))


@trap("linear attention", q=(WIDTH, WIDTH), k=(WIDTH, WIDTH), v=(WIDTH, WIDTH), o=(WIDTH, WIDTH))
def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = F.relu(m.q(x)), F.relu(m.k(x))
    return m.o(q @ (k.mT @ m.v(x)))


@trap("a gated recurrence", gate=UP, **PAIR)
def gated_recurrence(m: Any, x: Tensor) -> Tensor:
    gate, value = torch.sigmoid(m.gate(x)), m.up(x)
    state, outputs = torch.zeros_like(value[:, 0]), []
    for t in range(TOKENS):
        state = gate[:, t] * state + (1 - gate[:, t]) * value[:, t]
        outputs.append(state)
    return m.down(torch.stack(outputs, dim=1))


@trap("a state space with a gate", gate=UP, **PAIR, conv=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, groups=HIDDEN))
def gated_convolution(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.conv(m.up(x).mT)[..., :TOKENS].mT)
    return m.down(h * F.silu(m.gate(x)))


@trap("the gates of an LSTM", lstm=lambda: nn.LSTM(WIDTH, HIDDEN, batch_first=True), down=DOWN)
def lstm(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.tanh(m.lstm(x)[0]))


@trap("a GRU written out", gates=lambda: nn.Linear(2 * WIDTH, 2 * WIDTH), new=lambda: nn.Linear(2 * WIDTH, WIDTH))
def gru_written_out(m: Any, x: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(TOKENS):
        reset, update = torch.sigmoid(m.gates(torch.cat([x[:, t], state], -1))).chunk(2, -1)
        state = (1 - update) * state + update * torch.tanh(m.new(torch.cat([x[:, t], reset * state], -1)))
        outputs.append(state)
    return torch.stack(outputs, dim=1)


@trap(
    "a mixture of experts already, with one weight for all",
    w1=weight(3, WIDTH, HIDDEN),
    w2=weight(3, HIDDEN, WIDTH),
    router=(WIDTH, 3),
)
def mixture_with_stacked_weights(m: Any, x: Tensor) -> Tensor:
    h = F.silu(torch.einsum("btd,edh->ebth", x, m.w1))
    y = torch.einsum("ebth,ehd->ebtd", h, m.w2)
    return (y * torch.softmax(m.router(x), -1).permute(2, 0, 1).unsqueeze(-1)).sum(0)


@trap("a mixture of experts already, by batched products", w1=weight(3, WIDTH, HIDDEN), w2=weight(3, HIDDEN, WIDTH))
def mixture_with_batched_products(m: Any, x: Tensor) -> Tensor:
    rows = x.reshape(1, -1, WIDTH).expand(3, -1, -1)
    return torch.bmm(F.silu(torch.bmm(rows, m.w1)), m.w2).mean(0).view_as(x)


# No activation, or no FFN ---------------------------------------------------------------------------------------------


@trap("no activation between the linears", a=(WIDTH, 4, False), b=(4, WIDTH, False))
def low_rank(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x))


@trap("no activation between the linears", **PAIR, drop=lambda: nn.Dropout(0.1))
def low_rank_with_dropout(m: Any, x: Tensor) -> Tensor:
    return m.down(m.drop(m.up(x)) * 0.5)


@trap("no activation between the linears", **PAIR, act=nn.Identity)
def identity_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.act(m.up(x)))


@trap("noise stands between in training, nothing in evaluation", certain=False, **PAIR)
def noise_in_training_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h + 0.1 * torch.randn_like(h) if m.training else h)


@trap("whole samples are dropped between", certain=False, **PAIR)
def sample_drop_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    if m.training:
        h = h * torch.bernoulli(torch.full((h.shape[0], 1, 1), 0.9)) / 0.9
    return m.down(h)


@trap("the number of hidden tokens depends on their values", **PAIR)
def selected_tokens_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    chosen = h[h.sum(-1) > 1.0]
    return x + m.down(chosen).sum(0)


# Weights that are more than the two linears' own ----------------------------------------------------------------------


@trap("the second weight is the first one transposed", w=weight(HIDDEN, WIDTH))
def tied_transposed(m: Any, x: Tensor) -> Tensor:
    return F.relu(x @ m.w.t()) @ m.w


@trap("the first weight is also used elsewhere", **PAIR)
def first_weight_used_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) + 0.1 * m.up(x)[..., :WIDTH]


@trap("the second weight is also used elsewhere", **PAIR, other=UP)
def second_weight_used_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) + m.down(torch.softmax(m.other(x), -1))


@trap("the weight's norm is part of the output", **PAIR)
def weight_norm_in_output(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) * m.up.weight.norm()


@trap("gate and up are one weight", **PAIR)
def gate_shares_weight_with_up(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.up(x)) * m.up(x))


@trap("two FFNs share their first linear", certain=False, up=UP, down=DOWN, other=DOWN)
def first_linear_shared_by_two(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) + m.other(F.gelu(m.up(x)))


@trap("two FFNs share their second linear", certain=False, up=UP, other=UP, down=DOWN)
def second_linear_shared_by_two(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) + m.down(F.relu(m.other(x)))


@trap("one linear is both first and second of a chain", w=(WIDTH, WIDTH))
def one_linear_twice(m: Any, x: Tensor) -> Tensor:
    return m.w(F.relu(m.w(x)))


@trap("a weight is parametrized", up=lambda: parametrizations.weight_norm(nn.Linear(*UP)), down=DOWN)
def weight_norm(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@trap("a weight is parametrized", up=lambda: parametrizations.spectral_norm(nn.Linear(*UP)), down=DOWN)
def spectral_norm(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@trap("a weight is masked by pruning", up=lambda: prune.l1_unstructured(nn.Linear(*UP), "weight", 0.5), down=DOWN)
def pruned_weight(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@trap("the weights depend on the input", make=(WIDTH, WIDTH * 4), down=(4, WIDTH))
def hypernetwork(m: Any, x: Tensor) -> Tensor:
    w = m.make(x.mean(dim=1)).view(-1, WIDTH, 4)
    return m.down(F.relu(x @ w))


CASES.mark_quick(
    [
        "hidden_feeds_second_linear",
        "preactivation_overwritten_and_used",
        "low_rank",
        "identity_between",
        "tied_transposed",
        "first_weight_used_elsewhere",
        "weight_norm",
        "attention",
        "mixture_with_stacked_weights",
    ]
)
