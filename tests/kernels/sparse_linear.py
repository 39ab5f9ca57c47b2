"""Random arguments for the operators of linear layers that skip inputs, and their definition written out in float64."""

import torch
from torch import Tensor

from surgeon.kernels.sparse_linear import LinearCall


class Linear(LinearCall):
    """The arguments of `surgeon::sparse_linear`."""

    def masked(self) -> "Linear":
        """The arguments of `surgeon::masked_linear`."""
        return self._replace(weight=self.weight.t())

    def require_grad(self) -> "Linear":
        """Leaves that require gradients where there is one."""
        named = self._asdict()
        for name in ("x", "weight", "bias", "centre"):
            value = named[name]
            if value is not None and value.is_floating_point():
                named[name] = value.detach().clone().requires_grad_()
        return Linear(**named)

    def leaves(self) -> list[Tensor]:
        return [value for value in self if isinstance(value, Tensor) and value.requires_grad]


def linear(
    lead: tuple[int, ...] = (3, 5),
    d_in: int = 9,
    d_out: int = 7,
    *,
    tau: float = 0.5,
    bias: bool = True,
    scale: bool = True,
    centre: bool = True,
    int8: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Linear:
    """Draw the arguments. About a share tau of the inputs is skipped, and about one in 8 is at its centre."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, middle = draw(*lead, d_in).to(dtype), draw(d_in).to(dtype)
    at_centre = torch.rand(x.shape, generator=generator) < 1 / 8
    x = torch.where(at_centre, middle if centre else torch.zeros((), dtype=dtype), x)
    scales = draw(d_in).abs().float() + 0.1
    usual = (draw(256, d_in).float() - (middle.float() if centre else 0.0)).abs() * (scales if scale else 1.0)
    levels = usual.flatten().quantile(torch.linspace(0, 1, 33))
    levels[0] = 0.0
    weight, integers = draw(d_in, d_out).to(dtype), torch.randint(-127, 128, (d_in, d_out), generator=generator)
    return Linear(
        x=x,
        weight=integers.to(torch.int8) if int8 else weight,
        bias=draw(d_out).to(dtype) if bias else None,
        scale=scales if scale else None,
        centre=middle if centre else None,
        levels=levels,
        tau=torch.tensor(tau),
        w_scale=draw(d_out).abs().float() / 64 if int8 else None,
    )


def threshold(levels: Tensor, tau: float) -> float:
    place = tau * (len(levels) - 1)
    below = min(int(place), len(levels) - 2)
    return float(levels[below]) + (place - below) * (float(levels[below + 1]) - float(levels[below]))


def oracle(args: Linear) -> Tensor:
    """What the operators compute, in float64."""
    x, weight, bias, scale, centre, levels, tau, w_scale = (t if t is None else t.detach() for t in args)
    least = threshold(levels, float(tau))
    wide = weight.double() if w_scale is None else weight.double() * w_scale.double()
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y = torch.zeros(weight.shape[1], dtype=torch.float64) if bias is None else bias.double().clone()
        for i in range(len(token)):
            deviation = float(token[i]) - (0.0 if centre is None else float(centre[i]))
            if not abs(deviation) * (1.0 if scale is None else float(scale[i])) <= least:
                y += deviation * wide[i]
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1) if rows else torch.zeros(*x.shape[:-1], weight.shape[1]).double()
