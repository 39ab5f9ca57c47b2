"""A gated feed-forward layer that skips the neurons whose gate is near zero, as a module of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.inputs.module import LEVELS
from surgeon.kernels.sparse_neurons import sparse_neurons
from surgeon.sites.ffn import FFNWeights


@dataclass(frozen=True)
class SparseNeuronsShape:
    """Everything about a `SparseNeurons` but the values of its tensors. biases: which of b1, b_gate and b2 it has.

    scale, centre: whether it has them.
    """

    d_in: int
    d_out: int
    neurons: int
    activation: str
    biases: tuple[str, ...]
    scale: bool
    centre: bool

    @property
    def describe(self) -> str:
        """`768→3072 neurons→768 silu`."""
        return f"{self.d_in}→{self.neurons} neurons→{self.d_out} {self.activation}"


class SparseNeurons(nn.Module):
    """A gated layer that computes the neurons whose gate is far from zero: x [..., d_in] → [..., d_out].

    `surgeon.kernels.sparse_neurons` defines what it computes. Parameters (h neurons): gate [h, d_in], b_gate [h],
    w1 [h, d_in], b1 [h], w2 [h, d_out], b2 [d_out]. Buffers: scale [h], centre [h], levels [257],
    all float32, and tau, a float32 scalar in [0, 1]. Those that the layer does not have are None.
    """

    gate: nn.Parameter
    b_gate: nn.Parameter | None
    w1: nn.Parameter
    b1: nn.Parameter | None
    w2: nn.Parameter
    b2: nn.Parameter | None
    scale: Tensor | None
    centre: Tensor | None
    levels: Tensor
    tau: Tensor

    def __init__(
        self, shape: SparseNeuronsShape, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.shape = shape
        neurons, biases = (shape.neurons,), shape.biases
        sizes: dict[str, tuple[int, ...] | None] = {
            "gate": (*neurons, shape.d_in),
            "b_gate": neurons if "b_gate" in biases else None,
            "w1": (*neurons, shape.d_in),
            "b1": neurons if "b1" in biases else None,
            "w2": (*neurons, shape.d_out),
            "b2": (shape.d_out,) if "b2" in biases else None,
        }
        for name, size in sizes.items():
            empty = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        buffers: dict[str, tuple[int, ...] | None] = {
            "scale": neurons if shape.scale else None,
            "centre": neurons if shape.centre else None,
            "levels": (LEVELS,),
            "tau": (),
        }
        for name, size in buffers.items():
            value = None if size is None else torch.empty(size, device=device, dtype=torch.float32)
            self.register_buffer(name, value)

    @classmethod
    def of(
        cls, weights: FFNWeights, activation: str, scale: Tensor | None, centre: Tensor | None, levels: Tensor
    ) -> SparseNeurons:
        """Make a layer that skips nothing yet from the weights of a gated layer, which it copies.

        What skipped neurons usually add becomes a part of the bias.
        """
        assert weights.gate is not None
        w1, b2 = weights.w1, weights.b2
        if centre is not None:
            # In float64, since it has to undo what the centre takes away.
            moved = centre.double() @ weights.w2.double()
            b2 = (moved if b2 is None else b2.double() + moved).to(w1.dtype)
        tensors = {**vars(weights), "b2": b2}
        biases = tuple(name for name in ("b1", "b_gate", "b2") if tensors[name] is not None)
        (neurons, d_in), d_out = w1.shape, weights.w2.shape[1]
        shape = SparseNeuronsShape(d_in, d_out, neurons, activation, biases, scale is not None, centre is not None)
        made = cls(shape, device="meta", dtype=None)
        for name, tensor in tensors.items():
            copied = None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)
            setattr(made, name, None if copied is None else nn.Parameter(copied))
        buffers = {"scale": scale, "centre": centre, "levels": levels, "tau": torch.zeros(())}
        for name, tensor in buffers.items():
            setattr(made, name, None if tensor is None else tensor.float().to(w1.device))
        return made

    def dense(self) -> FFNWeights:
        """Return the weights of the dense layer that it computes at tau 0."""
        b2: Tensor | None = self.b2
        if self.centre is not None and b2 is not None:
            b2 = (b2.double() - self.centre.double() @ self.w2.double()).to(b2.dtype)
        return FFNWeights(self.w1, self.b1, self.gate, self.b_gate, self.w2, b2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        y: Tensor = sparse_neurons(
            x, self.gate, self.b_gate, self.w1, self.b1, self.w2, self.b2, self.scale, self.centre,
            self.levels, self.tau, self.shape.activation,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        """`768→3072 neurons→768 silu`."""
        return self.shape.describe
