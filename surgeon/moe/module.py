"""A feed-forward layer as a mixture of experts: the module that passes put into a graph.

Before `lower`, a layer is one `call_module` node of an `MoE`. After `lower`, the graph has the router's ops and one
`surgeon::dynamic_k_ffn` node instead. A saved graph has ops in both cases. In a model that is not a graph (see
`surgeon.graft`), a layer is an `MoE` in either form. A layer with weights of 8 or 4 bits is an `Int8MoE`
(`surgeon.moe.int8`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.graph.traced import aten
from surgeon.kernels.experts import Experts
from surgeon.kernels.scores import Output
from surgeon.moe.filling import fill, silent_bias
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn, selection_threshold
from surgeon.moe.router import Router, Step
from surgeon.sites.ffn import FFNWeights

Form = Literal["masked", "dynamic", "int8"]
# Buffer with the mean output of the experts that a layer skips, see `surgeon.measure.compensation`.
SKIPPED_MEAN = "skipped_mean"


@dataclass(frozen=True)
class MoEShape:
    """Everything about an `MoE` but the values of its tensors.

    d_in, d_out: widths of its input and output. experts, size: E and s. biases: which of b1, b_gate and b2 it has.
    shared, rule, form, filling: as in `MoE`. compensated: whether it adds the mean of what it skips.
    router_width: the width of the router's trunk, None without one. router_bias, router_hidden, router_output and
    router_activation: as in `Router`. group: how many inputs share a factor of weights of 4 bits, None for others
    (`surgeon.kernels.panels`). float8: whether weights of 8 bits are in float8 rather than integers.
    """

    d_in: int
    d_out: int
    experts: int
    size: int
    activation: str
    gated: bool
    biases: tuple[str, ...]
    shared: int
    rule: str
    form: Form
    filling: int
    compensated: bool
    router_width: int | None
    router_bias: bool
    router_hidden: Literal["relu", "tanh"]
    router_output: Output
    group: int | None = None
    float8: bool = False
    router_activation: str | None = None

    @property
    def describe(self) -> str:
        """`48 experts × 32, 384→384 relu, max, dynamic`."""
        form = "fp8" if self.float8 else self.form if self.group is None else f"int4 in groups of {self.group}"
        return (
            f"{self.experts} experts × {self.size}, {self.d_in}→{self.d_out} {self.activation}"
            f"{' gated' * self.gated}, {self.rule}, {form}"
        )


def output_bias(layer: nn.Module) -> Tensor | None:
    """Return what a layer adds to its experts' outputs: b2 and, if it is compensated, the mean of what it skips."""
    b2: Any = getattr(layer, "b2", None)
    mean: Any = getattr(layer, SKIPPED_MEAN, None)
    if mean is None or b2 is None:
        return b2 if mean is None else mean  # type: ignore[no-any-return]
    return b2 + mean  # type: ignore[no-any-return]


class MoE(nn.Module):
    """A feed-forward layer split into experts of equal size, in ordinary trainable torch code.

    In the form "masked", the module computes every expert and masks out those that the rule does not select at tau, so
    it costs as much as the dense layer. `lower` replaces it by an op that skips these experts, which the form "dynamic"
    calls too. With tau = 0 every expert counts, and the output is the dense layer's. The rule is one of
    `kernels.selection.RULES`. It starts as "max", which skips experts whose score is below tau times the token's
    largest score.

    The first `shared` experts always run, and the router scores the others.

    Parameters (E experts of s neurons): w1 [E, s, d_in], b1 [E, s], gate [E, s, d_in], b_gate [E, s], w2 [E, s, d_out],
    b2 [d_out]. Those that the dense layer does not have are None. Buffer tau: a scalar in [0, 1]. A compensated layer
    has the buffer skipped_mean [d_out]. filling: how many neurons fill experts up (see `surgeon.moe.filling`).
    """

    tau: Tensor
    form: Form

    def __init__(
        self, weights: FFNWeights, labels: Tensor, experts: int, activation: str, router: Router, *, shared: int = 0
    ) -> None:
        """Split the weights by `labels` [h]: neuron i belongs to expert labels[i].

        Experts with fewer neurons than the largest are filled up (see `surgeon.moe.filling`).
        router: scores the experts after the first `shared`, which always run.
        """
        super().__init__()
        counts = torch.bincount(labels, minlength=experts)
        size, order = int(counts.max()), torch.argsort(labels, stable=True)
        # The place of a neuron: its rank among the neurons of its expert, after all places of the experts before.
        starts = counts.cumsum(0) - counts
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order)) - starts[labels[order]] + size * labels[order]

        def rows(value: Tensor | None, filling: float = 0.0) -> nn.Parameter | None:
            if value is None:
                return None
            # Copy the weights, because the traced model keeps its own.
            filled = fill(value.detach(), places, experts * size, filling)
            return nn.Parameter(filled.reshape(experts, size, *value.shape[1:]))

        silent, b1 = silent_bias(weights, activation), weights.b1
        if silent and b1 is None and experts * size > len(order):
            b1 = weights.w1.new_zeros(len(order))
        self.w1, self.b1 = rows(weights.w1), rows(b1, silent)
        self.gate, self.b_gate = rows(weights.gate), rows(weights.b_gate)
        self.w2 = rows(weights.w2)
        self.b2 = None if weights.b2 is None else nn.Parameter(weights.b2.detach().clone())
        self.activation, self.shared, self.rule = activation, shared, "max"
        self.form, self.filling = "masked", experts * size - len(order)
        self.router = router
        self.register_buffer("tau", torch.zeros((), dtype=torch.float32, device=weights.w1.device))

    @classmethod
    def empty(cls, shape: MoEShape, *, device: torch.device | str | None, dtype: torch.dtype | None) -> MoE:
        """Make a layer whose weights are still to be loaded."""
        options: Any = {"device": device, "dtype": dtype}
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        rows, ups = (shape.experts, shape.size), (shape.experts, shape.size, shape.d_in)
        sizes = {
            "w1": ups,
            "b1": rows if "b1" in shape.biases else None,
            "gate": ups if shape.gated else None,
            "b_gate": rows if "b_gate" in shape.biases else None,
            "w2": (*rows, shape.d_out),
            "b2": (shape.d_out,) if "b2" in shape.biases else None,
        }
        for name, size in sizes.items():
            made.register_parameter(name, None if size is None else nn.Parameter(torch.empty(size, **options)))
        made.activation, made.shared, made.rule = shape.activation, shape.shared, shape.rule
        made.form, made.filling = shape.form, shape.filling
        made.router = Router(
            shape.d_in, shape.router_width, shape.experts - shape.shared,
            bias=shape.router_bias, hidden=shape.router_hidden, output=shape.router_output,
            activation=shape.router_activation, gated=shape.gated, like=torch.empty((), **options),
        )  # fmt: skip
        made.register_buffer("tau", torch.zeros((), dtype=torch.float32, device=device))
        if shape.compensated:
            made.register_buffer(SKIPPED_MEAN, torch.zeros(shape.d_out, **options))
        return made

    @property
    def shape(self) -> MoEShape:
        """Its shape, as `empty` takes it."""
        experts, size, d_in = self.weights.w1.shape
        return MoEShape(
            d_in, self.weights.w2.shape[2], experts, size, self.activation, self.gate is not None,
            tuple(name for name in ("b1", "b_gate", "b2") if getattr(self, name) is not None),
            self.shared, self.rule, self.form, self.filling, hasattr(self, SKIPPED_MEAN),
            None if self.router.fc1 is None else self.router.fc1.out_features,
            self.router.fc2.bias is not None, self.router.hidden, self.router.output,
            router_activation=self.router.activation,
        )  # fmt: skip

    @property
    def weights(self) -> Experts:
        """The experts' weights."""
        assert self.w1 is not None
        assert self.w2 is not None
        return Experts(self.w1, self.b1, self.gate, self.b_gate, self.w2)

    @property
    def routed(self) -> Experts:
        """The weights of the experts that the router scores."""
        return self.weights.after(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x [..., d_in] → [..., d_out]."""
        scores, threshold = self.route(x)
        op = dynamic_k_ffn if self.form == "dynamic" else masked_ffn
        return op(  # type: ignore[no-any-return]
            x, scores, threshold, self.w1, self.b1, self.gate, self.b_gate, self.w2, self.output_bias, self.activation
        )

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the experts' outputs, [d_out]."""
        return output_bias(self)

    def extra_repr(self) -> str:
        """`48 experts × 32, 384→384 relu, max, dynamic`."""
        return self.shape.describe

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [..., E] and the threshold [...] below which an expert is skipped, for x [..., d_in]."""
        return self.select(lambda op, *args: op(*args), self.router(x), self.tau)

    def select(self, step: Step, scores: Any, tau: Any) -> tuple[Any, Any]:
        """Return the scores of all experts and the threshold. `step` runs the ops or adds them to a graph."""
        threshold = step(selection_threshold, scores, tau, self.rule)
        if self.shared:
            scores = step(aten.constant_pad_nd.default, scores, [self.shared, 0], float("inf"))
        return scores, threshold
