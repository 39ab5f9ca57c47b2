"""The operators of layers that skip neurons: what they compute, their gradients, and PyTorch's machinery."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from surgeon.errors import UsageError
from surgeon.kernels.sparse_linear import ordinary_ops
from surgeon.kernels.sparse_neurons import NeuronsCall, masked_neurons, selected_neurons, sparse_neurons

from .sparse_neurons import Neurons, neurons, oracle

OPERATORS: dict[str, Any] = {"sparse_neurons": sparse_neurons, "masked_neurons": masked_neurons}
both_operators = pytest.mark.parametrize("name", OPERATORS)


def run(name: str, args: NeuronsCall) -> Tensor:
    y: Tensor = OPERATORS[name](*args)
    return y


@settings(max_examples=80, deadline=None)
@given(
    lead=st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(0, 4))),
    sizes=st.tuples(*[st.integers(1, 24)] * 3),
    biases=st.tuples(*[st.booleans()] * 3),
    optional=st.tuples(*[st.booleans()] * 2),
    tau=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    activation=st.sampled_from(["silu", "relu", "gelu_tanh", "relu_relu", "mish"]),
    seed=st.integers(0, 9),
)
def test_both_operators_are_the_definition(
    lead: tuple[int, ...],
    sizes: tuple[int, int, int],
    biases: tuple[bool, bool, bool],
    optional: tuple[bool, bool],
    tau: float,
    activation: str,
    seed: int,
) -> None:
    scale, centre = optional
    args = neurons(lead, *sizes, tau=tau, biases=biases, scale=scale, centre=centre, activation=activation, seed=seed)
    expected = oracle(args)
    for name in OPERATORS:
        torch.testing.assert_close(run(name, args), expected)


@both_operators
def test_at_tau_0_it_is_the_dense_layer(name: str) -> None:
    """Also where gates are exactly zero, which would otherwise add their centre."""
    args = neurons((64,), tau=0.0, activation="relu")
    assert args.centre is not None
    assert args.b2 is not None
    moved = args._replace(b2=args.b2 + args.centre.double() @ args.w2)
    hidden = F.relu(F.linear(args.x, args.gate, args.b_gate)) * F.linear(args.x, args.w1, args.b1)
    assert (hidden == 0).any()
    torch.testing.assert_close(run(name, moved), F.linear(hidden, args.w2.t(), args.b2))


@both_operators
def test_a_nan_stays_in_its_row(name: str) -> None:
    args = neurons((4,), tau=1.0)
    args.x[2, 3] = float("nan")
    assert run(name, args).isnan().any(1).tolist() == [False, False, True, False]


@both_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_close(name: str, dtype: torch.dtype) -> None:
    args = neurons((7,), 64, 48, 24, dtype=dtype, tau=0.0)
    found, expected = run(name, args), oracle(args)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


@both_operators
def test_inputs_need_not_be_contiguous(name: str) -> None:
    args = neurons()

    def twist(value: Any) -> Any:
        return torch.stack([value, value + 1], -1)[..., 0] if isinstance(value, Tensor) and value.dim() else value

    torch.testing.assert_close(run(name, Neurons(*map(twist, args))), oracle(args))


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_twin_and_of_finite_differences() -> None:
    found = []
    for name in OPERATORS:
        args = neurons().require_grad()
        run(name, args).square().sum().backward()
        found.append([value.grad for value in args[:7]])
    torch.testing.assert_close(*found)
    args = neurons((4,), 5, 6, 3).require_grad()
    assert torch.autograd.gradcheck(lambda *first: run("sparse_neurons", Neurons(*first, *args[7:])), args[:7])


func = torch.func
Layer = Callable[[Tensor], Tensor]
DERIVATIVES: dict[str, Callable[[Layer, Tensor], Any]] = {
    "jvp": lambda layer, x: func.jvp(layer, (x,), (torch.ones_like(x),)),
    "jacrev": lambda layer, x: func.jacrev(layer)(x),
    "hessian": lambda layer, x: func.hessian(lambda x: layer(x).square().sum())(x),
    "vmap": lambda layer, x: func.vmap(layer)(torch.stack([x, -x])),
    "dual": lambda layer, x: _dual(layer, x),
}


def _dual(layer: Layer, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", DERIVATIVES)
def test_derivatives_of_every_mode_are_those_of_the_twin(mode: str) -> None:
    args = neurons((3,), 5, 6, 4)
    found, expected = (DERIVATIVES[mode](lambda x, op=op: op(x, *args[1:]), args.x) for op in OPERATORS.values())
    torch.testing.assert_close(found, expected)
    assert any(bool(value.any()) for value in torch.utils._pytree.tree_leaves(expected))


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, args = name, neurons(dtype=torch.float32)
        for part in NeuronsCall._fields[1:7]:
            setattr(self, part, nn.Parameter(getattr(args, part)))
        for part in NeuronsCall._fields[7:-1]:
            self.register_buffer(part, getattr(args, part))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OPERATORS[self.name](x, *(getattr(self, part) for part in NeuronsCall._fields[1:-1]), "silu")
        return y


def test_opcheck() -> None:
    args = neurons(dtype=torch.float32)
    given = (args.x, torch.randn(3, 5, 12), args.w1, args.b1, args.w2, args.b2, *args[7:11], False)
    torch.library.opcheck(selected_neurons.default, given)


@both_operators
def test_export_keeps_one_node_and_any_size(name: str) -> None:
    model, x = Layers(name), torch.randn(2, 3, 9)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [f"surgeon.{name}.default"]
    module = exported.module(check_guards=False)
    for shape in ((4, 9), (1, 1), (0, 3)):
        other = torch.randn(*shape, 9)
        torch.testing.assert_close(module(other), model(other))
    with ordinary_ops():
        plain = torch.export.export(model, (x,))
    assert not [node for node in plain.graph.nodes if "surgeon" in str(node.target)]
    torch.testing.assert_close(plain.module()(x), model(x))


@both_operators
def test_compile_whole_graph_forward_and_training(name: str) -> None:
    torch.compiler.reset()
    eager, x = Layers(name), torch.randn(3, 5, 9)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (x, torch.randn(2, 8, 9)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs), eager(inputs))
        torch.testing.assert_close(compiled(inputs), eager(inputs))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    torch.testing.assert_close(compiled.w1.grad, eager.w1.grad)


@both_operators
def test_autocast_casts_the_products(name: str) -> None:
    args = neurons(dtype=torch.float32, tau=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(name, args)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), run(name, args), rtol=0.05, atol=0.05)


@both_operators
def test_flops_are_those_of_all_neurons(name: str) -> None:
    args = neurons(dtype=torch.float32, tau=0.9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(name, args)
    assert counter.get_total_flops() == 2 * 15 * 12 * (9 + 9 + 7)


@both_operators
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"gate has shape \(12, 9\), expected \(12, 8\)"),
        ({"x": torch.zeros(3, 9, dtype=torch.int64)}, r"x must be floating.* got torch.int64"),
        ({"x": torch.zeros(3, 9, dtype=torch.float64)}, "gate is torch.float32, expected torch.float64"),
        ({"gate": torch.zeros(9)}, r"gate and w2 need 2 dimensions .* got gate \(9,\)"),
        ({"w1": torch.zeros(11, 9)}, r"w1 has shape \(11, 9\), expected \(12, 9\)"),
        ({"b2": torch.zeros(9)}, r"b2 has shape \(9,\), expected \(7,\)"),
        ({"centre": torch.zeros(12, dtype=torch.int32)}, "centre is torch.int32, expected a floating dtype"),
        ({"levels": torch.zeros(1)}, r"levels 1 of at least 2 values, got .* levels \(1,\)"),
        ({"tau": torch.zeros(1)}, r"tau has shape \(1,\), expected \(\)"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_wrong_arguments_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    args = neurons(dtype=torch.float32)._replace(**changes)
    with pytest.raises(UsageError, match=message):
        run(name, args)


def test_a_tensor_elsewhere_is_named() -> None:
    with FakeTensorMode():
        here = [torch.empty(t.shape) if isinstance(t, Tensor) else t for t in neurons(dtype=torch.float32)]
        with pytest.raises(UsageError, match="sparse neurons: levels is on meta, x on cpu"):
            run("sparse_neurons", Neurons(*here)._replace(levels=torch.empty(33, device="meta")))
