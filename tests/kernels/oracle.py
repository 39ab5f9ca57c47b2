"""The dynamic-k FFN as one would write it from its definition: float64, one token, one expert, one neuron at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: max(z, 0.0) if not math.isnan(z) else z,
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "identity": lambda z: z,
    "tanh": math.tanh,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "elu": lambda z: z if z > 0 else math.expm1(z),
    "selu": lambda z: 1.0507009873554805 * (z if z > 0 else 1.6732632423543772 * math.expm1(z)),
    "mish": lambda z: z * math.tanh(math.log1p(math.exp(z))),
    "relu6": lambda z: min(max(z, 0.0), 6.0),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "hardswish": lambda z: z * min(max(z + 3, 0.0), 6.0) / 6,
    "hardtanh": lambda z: min(max(z, -1.0), 1.0),
    "softsign": lambda z: z / (1 + abs(z)),
    "relu_relu": lambda z: max(z, 0.0) if not math.isnan(z) else z,
}


def oracle(
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor | None,
    b_gate: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    act, (experts, neurons, _), d_out = FUNCTIONS[activation], w1.shape, w2.shape[2]
    lead, x, w1, b1, gate, b_gate, w2 = (
        x.shape[:-1],
        *(t if t is None else t.detach() for t in (x, w1, b1, gate, b_gate, w2)),
    )
    rows = []
    for token, score, least in zip(
        x.reshape(-1, x.shape[-1]).double(),
        scores.reshape(-1, experts).double(),
        threshold.reshape(-1).double(),
        strict=True,
    ):
        y = torch.zeros(d_out, dtype=torch.float64) if b2 is None else b2.detach().double().clone()
        for e in range(experts):
            if score[e] < least:
                continue
            for j in range(neurons):
                up = float(w1[e, j].double() @ token) + (0.0 if b1 is None else float(b1[e, j]))
                if gate is None:
                    h = act(up)
                else:
                    up = act(up) if activation == "relu_relu" else up
                    h = act(float(gate[e, j].double() @ token) + (0.0 if b_gate is None else float(b_gate[e, j]))) * up
                y += h * w2[e, j].double()
        rows.append(y)
    return torch.stack(rows).view(*lead, d_out) if rows else torch.zeros(*lead, d_out, dtype=torch.float64)
