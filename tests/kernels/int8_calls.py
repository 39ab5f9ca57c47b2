"""Random arguments for the int8 operators, what they compute, written from the definition in float64, and how near."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgeon.kernels.experts import Experts
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import Int8Experts, pack, quantise_trunk
from surgeon.kernels.selection import selection_threshold
from tests.kernels.oracle import FUNCTIONS

HIDDEN = {"relu": lambda z: max(z, 0.0), "tanh": math.tanh}
OUTPUT = {
    "abs": abs,
    "relu": lambda z: max(z, 0.0),
    "softplus": lambda z: math.log1p(math.exp(50 * z)) / 50 if z < 0.4 else z,
    "exp": math.exp,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
}


# Of the largest output of a token. A value next to the middle between two integers may be rounded either way; a step of
# an input or of a hidden value is about a hundredth of it.
STEP = 0.03
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def int8_call(
    lead: tuple[int, ...] = (3, 5),
    experts: int = 6,
    neurons: int = 4,
    d_in: int = 5,
    d_out: int = 7,
    *,
    width: int | None = 8,
    shared: int = 0,
    rule: str = "top_k",
    tau: float = 0.5,
    gated: bool = False,
    bias: bool = True,
    scaled: bool = False,
    activation: str = "relu",
    hidden: str = "relu",
    output: str = "abs",
    dtype: torch.dtype = torch.float32,
    group: int | None = None,
    float8: bool = False,
    seed: int = 0,
) -> Int8Call:
    """Arguments with about normal values. width: of the router's trunk, None for none.

    group, float8: as in `Int8Experts.of`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    x_scale = 0.5 + torch.rand(d_in, generator=generator) if scaled else None
    first = (experts, neurons, d_in)
    floats = Experts(
        draw(*first, scale=d_in**-0.5),
        draw(experts, neurons) if bias else None,
        draw(*first, scale=d_in**-0.5) if gated else None,
        draw(experts, neurons) if gated and bias else None,
        draw(experts, neurons, d_out),
    )
    fc1, fc1_scale = (None, None) if width is None else quantise_trunk(draw(width, d_in, scale=d_in**-0.5))
    inputs = d_in if width is None else width
    return Int8Call(
        x=draw(*lead, d_in).to(dtype),
        tau=torch.tensor(tau),
        rule=rule,
        shared=shared,
        x_scale=x_scale,
        fc1=None if fc1 is None else pack(fc1),
        fc1_scale=fc1_scale,
        fc1_bias=None if width is None or not bias else draw(width),
        fc2=draw(experts - shared, inputs, scale=inputs**-0.5),
        fc2_bias=draw(experts - shared) if bias else None,
        hidden=hidden,
        output=output,
        **Int8Experts.of(floats, x_scale, group, float8=float8)._asdict(),
        b2=draw(d_out) if bias else None,
        activation=activation,
    )


def _integers(panels: Tensor, row: int, columns: int) -> Tensor:
    """Row `row` of a matrix in panels [N / 16, K / depth, 16, depth]."""
    depth = panels.shape[-1]
    return torch.stack([panels[row // 16, k // depth, row % 16, k % depth] for k in range(columns)]).double()


def _numbers(panels: Tensor, factors: Tensor | None, row: int, columns: int) -> Tensor:
    """Row `row` of a matrix of weights of 8 bits, or of 4 bits with factors [N / 16, G, 16]."""
    if panels.dtype == torch.float8_e4m3fn:
        found = [_float8(int(byte)) for byte in _integers(panels.view(torch.uint8), row, columns)]
        return torch.tensor(found, dtype=torch.float64)
    if factors is None:
        return _integers(panels, row, columns)
    # Groups have as many eights of inputs each as so many groups need.
    size = 8 * math.ceil(math.ceil(columns / 8) / factors.shape[1])
    found = []
    for k in range(columns):
        byte = int(panels[row // 16, k // 8, row % 16, k % 4])
        half = byte // 16 if k % 8 >= 4 else byte % 16
        found.append(float((half - 8) * int(factors[row // 16, k // size, row % 16])))
    return torch.tensor(found, dtype=torch.float64)


def _float8(byte: int) -> float:
    """The number that a byte stands for: a sign, 4 bits of an exponent and 3 of a fraction."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -size if byte & 128 else size


def _rounded(z: Tensor, most: int) -> tuple[Tensor, float]:
    """Rounded to integers, or to float16 if there are so many of them."""
    scale = float(z.abs().max()) / most
    if not scale:
        return torch.zeros_like(z), scale
    return (z / scale).half().double() if most > 10000 else (z / scale).round(), scale


def _or_zeros(bias: Tensor | None, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64) if bias is None else bias.double()


def oracle_scores(call: Int8Call) -> Tensor:
    """The scores [tokens, E - shared] in float64."""
    d_in, found = call.x.shape[-1], []
    for x in call.x.reshape(-1, d_in).double():
        t = x
        if call.fc1 is not None and call.fc1_scale is not None:
            q, scale = _rounded(x if call.x_scale is None else x * call.x_scale.double(), 2047)
            width = len(call.fc1_scale)
            bias = _or_zeros(call.fc1_bias, width)
            t = torch.tensor(
                [
                    HIDDEN[call.hidden](
                        float(_integers(call.fc1, r, d_in) @ q * scale * call.fc1_scale[r].double() + bias[r])
                    )
                    for r in range(width)
                ],
                dtype=torch.float64,
            )
        logits = call.fc2.double() @ t + _or_zeros(call.fc2_bias, len(call.fc2))
        found.append(torch.tensor([OUTPUT[call.output](float(z)) for z in logits], dtype=torch.float64))
    return torch.stack(found)


def oracle(call: Int8Call, scores: Tensor) -> Tensor:
    """What the operator gives [tokens, d_out] for scores [tokens, E - shared], in float64."""
    d_in, (experts, neurons), d_out = call.x.shape[-1], call.w1_scale.shape, len(call.y_scale)
    float8 = call.w1.dtype == torch.float8_e4m3fn
    never_negative = call.activation == "relu_relu" or (
        call.gate is None and call.activation in ("relu", "relu2", "relu6", "sigmoid", "softplus")
    )
    least = selection_threshold(scores, call.tau, call.rule)
    act, rows = FUNCTIONS[call.activation], []
    for x, score, threshold in zip(call.x.reshape(-1, d_in).double(), scores, least, strict=True):
        q, scale = _rounded(x if call.x_scale is None else x * call.x_scale.double(), 32768 if float8 else 127)
        y = torch.zeros(d_out, dtype=torch.float64)
        for e in range(experts):
            if e >= call.shared and score[e - call.shared] < threshold:
                continue

            def into(
                panels: Tensor, factors: Tensor | None, scales: Tensor, bias: Tensor | None, j: int, e: int = e
            ) -> float:
                row = _numbers(panels[e], None if factors is None else factors[e], j, d_in)
                product = row @ q * scale * scales[e, j].double()  # noqa: B023
                return float(product + (0.0 if bias is None else bias[e, j].double()))

            h = []
            for j in range(neurons):
                up = into(call.w1, call.w1_group, call.w1_scale, call.b1, j)
                if call.gate is None or call.gate_scale is None:
                    h.append(act(up))
                else:
                    up = act(up) if call.activation == "relu_relu" else up
                    h.append(act(into(call.gate, call.gate_group, call.gate_scale, call.b_gate, j)) * up)
            values = torch.tensor(h, dtype=torch.float64) * call.w2_scale[e].double()
            whole, h_scale = _rounded(values, 32768 if float8 else 255 if never_negative else 127)
            for c in range(d_out):
                row = _numbers(call.w2[e], None if call.w2_group is None else call.w2_group[e], c, neurons)
                y[c] += row @ whole * h_scale
        rows.append(y * call.y_scale.double() + _or_zeros(call.b2, d_out))
    return torch.stack(rows)


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """The largest difference of every token, relative to its largest output or to what outputs usually are.

    In an output near zero large numbers cancel. A step of rounding in one of them is large beside their sum.
    """
    found, wanted = found.double().view(wanted.shape), wanted.double()
    size = wanted.abs().amax(-1).maximum(wanted.square().mean().sqrt())
    return (found - wanted).abs().amax(-1) / size.clamp_min(1e-3)


def agree(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """All tokens up to steps of rounding, and most without them (in half types many values lie in the middle)."""
    error = errors(found, wanted)
    assert float(error.max()) < STEP
    if dtype == torch.float32:
        assert float((error > DTYPES[dtype]).double().mean()) <= 0.2
