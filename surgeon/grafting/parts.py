"""The modules that stand in a grafted model in place of those of the dense model, and how they are described.

`Plan` says which module of a model is replaced by what. It is plain data: a model that was saved with its plan can be
built again without a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.inputs.module import SparseLinear, SparseLinearShape
from surgeon.inputs.neurons import SparseNeurons, SparseNeuronsShape
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts, hidden
from surgeon.moe.int8 import Int8MoE
from surgeon.moe.module import MoE, MoEShape
from surgeon.sites.ffn import FFNWeights
from surgeon.sites.rejection import Rejection

# Attribute of a grafted model with its `Graft`.
GRAFT = "surgeon_graft"


@dataclass(frozen=True)
class MLPShape:
    """Everything about an `MLP` but the values of its weights. biases: which of b1, b_gate and b2 it has."""

    d_in: int
    d_out: int
    neurons: int
    activation: str
    gated: bool
    biases: tuple[str, ...]


PartShape: TypeAlias = MoEShape | MLPShape | SparseLinearShape | SparseNeuronsShape


@dataclass(frozen=True)
class Layer:
    """What takes a layer's place: one part, or several whose outputs are joined (queries, keys and values).

    residual: whether the input is added to the output. dropout: the probability of dropout on the output of a part.
    """

    parts: tuple[PartShape, ...]
    residual: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Which modules of a model are replaced, by path.

    layers: converted layers, each at the module that now computes it. passed: modules that only return their input.
    ones: modules that return a 1, the neutral factor of a gated layer. functions: (module, attribute) of activations
    that are plain functions, and now return their input.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    passed: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    functions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Graft:
    """What was done to a model: the modules that were replaced, and the layers that stayed dense with the reason.

    kept: the weights that the graph does not use, which are those of the model that was given.
    """

    plan: Plan
    refused: tuple[Rejection, ...] = ()
    kept: tuple[str, ...] = ()


class MLP(nn.Module):
    """A dense feed-forward layer: x [..., d_in] → [..., d_out].

    Parameters (h neurons): w1 [h, d_in], b1 [h], gate [h, d_in], b_gate [h], w2 [h, d_out], b2 [d_out]. Those that the
    layer does not have are None.
    """

    w1: nn.Parameter
    b1: nn.Parameter | None
    gate: nn.Parameter | None
    b_gate: nn.Parameter | None
    w2: nn.Parameter
    b2: nn.Parameter | None

    def __init__(self, shape: MLPShape, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.shape = shape
        ups = (shape.neurons, shape.d_in)
        sizes = {
            "w1": ups,
            "b1": (shape.neurons,) if "b1" in shape.biases else None,
            "gate": ups if shape.gated else None,
            "b_gate": (shape.neurons,) if "b_gate" in shape.biases else None,
            "w2": (shape.neurons, shape.d_out),
            "b2": (shape.d_out,) if "b2" in shape.biases else None,
        }
        for name, size in sizes.items():
            empty = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, empty)

    @classmethod
    def of(cls, weights: FFNWeights, activation: str) -> MLP:
        """Make a layer from weights, which it shares if they are laid out as it needs."""
        biases = tuple(name for name in ("b1", "b_gate", "b2") if getattr(weights, name) is not None)
        (neurons, d_in), d_out = weights.w1.shape, weights.w2.shape[1]
        shape = MLPShape(d_in, d_out, neurons, activation, weights.gate is not None, biases)
        made = cls(shape, device="meta", dtype=None)
        for name in ("w1", "b1", "gate", "b_gate", "w2", "b2"):
            value = getattr(weights, name)
            setattr(made, name, None if value is None else nn.Parameter(value.detach()))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        experts = Experts(self.w1, self.b1, self.gate, self.b_gate, self.w2)
        return F.linear(hidden(x, experts, ACTIVATIONS[self.shape.activation]), self.w2.t(), self.b2)

    def extra_repr(self) -> str:
        """`384→192→384 relu`."""
        shape = self.shape
        return f"{shape.d_in}→{shape.neurons}→{shape.d_out} {shape.activation}{' gated' * shape.gated}"


class Joined(nn.Module):
    """Several layers of the same input in place of one, with their outputs side by side: x [..., d_in] → [..., d_out].

    residual: whether the input is added. dropout: on the output of each part, in training.
    """

    def __init__(self, parts: Iterable[nn.Module], *, residual: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.residual, self.dropout = residual, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Compute all parts."""
        outputs = [F.dropout(part(x), self.dropout, self.training) for part in self.parts]
        y = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        """The options that are set."""
        return ", ".join(["residual"] * self.residual + [f"dropout={self.dropout}"] * bool(self.dropout))


class One(nn.Module):
    """Returns a 1 in the input's dtype, a scalar: the neutral factor in place of a gated layer's up linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Ignore the values of x."""
        return x.new_ones(())


def passed(x: Any, *_: Any, **__: Any) -> Any:
    """Return x: what an activation function in a grafted model does, because the layer's module has computed all."""
    return x


def empty_layer(layer: Layer, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """Make the module of a layer, with weights that are still to be loaded."""
    parts: list[nn.Module] = [_empty_part(shape, device=device, dtype=dtype) for shape in layer.parts]
    return joined(parts, residual=layer.residual, dropout=layer.dropout)


def _empty_part(shape: PartShape, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(shape, MLPShape):
        return MLP(shape, device=device, dtype=dtype)
    if isinstance(shape, SparseLinearShape):
        return SparseLinear(shape, device=device, dtype=dtype)
    if isinstance(shape, SparseNeuronsShape):
        return SparseNeurons(shape, device=device, dtype=dtype)
    if shape.form == "int8":
        return Int8MoE.empty(shape, device=device)
    return MoE.empty(shape, device=device, dtype=dtype)


def joined(parts: list[nn.Module], *, residual: bool = False, dropout: float = 0.0) -> nn.Module:
    """Return the module of a layer: its only part, or a `Joined`."""
    if len(parts) == 1 and not residual and not dropout:
        return parts[0]
    return Joined(parts, residual=residual, dropout=dropout)


def layer_of(module: nn.Module) -> Layer:
    """Describe the module of a layer."""
    if isinstance(module, Joined):
        return Layer(tuple(_part(part) for part in module.parts), module.residual, module.dropout)
    return Layer((_part(module),))


def _part(module: nn.Module) -> PartShape:
    assert isinstance(module, MoE | Int8MoE | MLP | SparseLinear | SparseNeurons)
    return module.shape


def plan_of(model: nn.Module, plan: Plan) -> Plan:
    """Return a plan with the layers as they are now in a model."""
    return replace(plan, layers={path: layer_of(model.get_submodule(path)) for path in plan.layers})


def united(*plans: Plan) -> Plan:
    """Return the plan that does what several do, one after the other."""

    def parts(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(part for plan in plans for part in getattr(plan, name)))

    layers = {path: layer for plan in plans for path, layer in plan.layers.items()}
    return Plan(layers, parts("passed"), parts("ones"), parts("functions"))


def put(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Replace the modules of `plan` in a model. layers: by path.

    Hooks of the modules that give way to a layer move to it.
    """
    new: dict[str, nn.Module] = dict(layers)
    new |= {path: nn.Identity() for path in plan.passed} | {path: One() for path in plan.ones}
    for path, module in new.items():
        put_one(model, path, module)
    for path, name in plan.functions:
        setattr(model.get_submodule(path), name, passed)
    leave_fused_paths(model)


def leave_fused_paths(model: nn.Module) -> None:
    """Switch off the fused path of torch's own encoder layers whose linear layers are not what they were.

    It reads the weights of these layers itself.
    """

    def changed(layer: Any) -> bool:
        return not (isinstance(layer.linear1, nn.Linear) and isinstance(layer.linear2, nn.Linear))

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and changed(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(map(changed, module.layers)):
            module.enable_nested_tensor = module.use_nested_tensor = False


def put_one(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path, wherever the model holds it. The new one takes over its mode and its hooks."""
    old = model.get_submodule(path)
    module.train(old.training)
    for name in _HOOKS:
        vars(module)[name].update(vars(old).get(name, {}))
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = module
        # Some models keep their modules in a plain list as well, and call those.
        for name, value in vars(owner).items():
            if isinstance(value, list | tuple) and any(item is old for item in value):
                vars(owner)[name] = type(value)(module if item is old else item for item in value)


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
