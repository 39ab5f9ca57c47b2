"""The operators of linear layers that skip inputs: what they compute, their gradients, and PyTorch's machinery."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
from surgeon.kernels.sparse_linear import kept, masked_linear, sparse_linear, threshold

from .sparse_linear import Linear, linear, oracle
from .sparse_linear import threshold as expected_threshold

both_operators = pytest.mark.parametrize("name", ["sparse_linear", "masked_linear"])


def run(name: str, args: Linear) -> Tensor:
    y: Tensor = sparse_linear(*args) if name == "sparse_linear" else masked_linear(*args.masked())
    return y


@settings(max_examples=80, deadline=None)
@given(
    lead=st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(0, 4))),
    sizes=st.tuples(*[st.integers(1, 40)] * 2),
    optional=st.tuples(*[st.booleans()] * 4),
    tau=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    seed=st.integers(0, 9),
)
def test_both_operators_are_the_definition(
    lead: tuple[int, ...], sizes: tuple[int, int], optional: tuple[bool, ...], tau: float, seed: int
) -> None:
    bias, scale, centre, int8 = optional
    args = linear(lead, *sizes, tau=tau, bias=bias, scale=scale, centre=centre, int8=int8, seed=seed)
    expected = oracle(args)
    for name in ("sparse_linear", "masked_linear"):
        found = run(name, args)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.9999, 1.0])
def test_the_threshold_is_between_levels(tau: float) -> None:
    levels = torch.tensor([0.0, 1.0, 5.0])
    assert float(threshold(levels, torch.tensor(tau))) == pytest.approx(expected_threshold(levels, tau), rel=1e-6)
    assert float(threshold(levels, torch.tensor(1.0))) == 5.0


def test_inputs_above_the_threshold_are_kept() -> None:
    levels, tau = torch.tensor([0.0, 1.0]), torch.tensor(1.0)
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.25, float("nan")])
    assert kept(x, None, None, levels, tau).tolist() == [True, False, False, False, True, True]
    assert kept(x, torch.full((6,), 0.75), None, levels, tau).tolist() == [True, False, False, False, False, True]
    assert kept(x, None, torch.ones(6), levels, tau).tolist() == [True, True, False, False, False, True]


@both_operators
def test_at_tau_0_only_inputs_at_their_centre_are_skipped(name: str) -> None:
    args = linear((6,), tau=0.0)
    assert torch.equal(kept(args.x, args.scale, args.centre, args.levels, args.tau), args.x != args.centre)
    torch.testing.assert_close(run(name, args), F.linear(args.x - args.centre, args.weight.t(), args.bias))


@both_operators
def test_a_nan_stays_in_its_row(name: str) -> None:
    args = linear((4,), tau=1.0)
    args.x[2, 3] = float("nan")
    found = run(name, args)
    assert found.isnan().any(1).tolist() == [False, False, True, False]
    assert found[2].isnan().all()


@both_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_other_dtypes_are_close(name: str, dtype: torch.dtype, int8: bool) -> None:
    args = linear((7,), 64, 24, dtype=dtype, int8=int8)
    found, expected = run(name, args), oracle(args)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


@both_operators
def test_inputs_need_not_be_contiguous(name: str) -> None:
    args = linear()
    twisted = Linear(*(t if t is None or not t.dim() else torch.stack([t, t + 1], -1)[..., 0] for t in args))
    assert not twisted.x.is_contiguous()
    torch.testing.assert_close(run(name, twisted), oracle(args))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("lead", [(1,), (3, 5), (0, 4)], ids=str)
def test_gradients_are_those_of_the_twin(lead: tuple[int, ...], int8: bool) -> None:
    ours, theirs = (linear(lead, int8=int8).require_grad() for _ in range(2))
    weight = torch.linspace(-1, 2, 7, dtype=torch.float64)
    (run("sparse_linear", ours) * weight).sum().backward()
    (run("masked_linear", theirs) * weight).sum().backward()
    assert len(ours.leaves()) == (3 if int8 else 4)
    for mine, other in zip(ours.leaves(), theirs.leaves(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("only", ["x", "weight", "bias", "centre"])
def test_only_the_gradients_asked_for(only: str) -> None:
    args = linear().require_grad()
    expected = torch.autograd.grad(run("masked_linear", args).square().sum(), getattr(args, only))
    for leaf in args.leaves():
        leaf.requires_grad_(leaf is getattr(args, only))
    run("sparse_linear", args).square().sum().backward()
    torch.testing.assert_close(getattr(args, only).grad, expected[0])


def test_gradients_are_those_of_finite_differences() -> None:
    args = linear((4,), 5, 3).require_grad()

    def layer(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor) -> Tensor:
        return run("sparse_linear", args._replace(x=x, weight=weight, bias=bias, centre=centre))

    # What is at its centre would not stay there.
    moved = args.x.detach() + 0.01 * (args.x == args.centre)
    assert torch.autograd.gradcheck(layer, (moved.requires_grad_(), args.weight, args.bias, args.centre))


func = torch.func
Layer = Callable[[Tensor, Tensor], Tensor]


def scalar(layer: Layer) -> Layer:
    return lambda x, weight: layer(x, weight).square().sum()


def second_order(layer: Layer, x: Tensor, weight: Tensor) -> Any:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    first = torch.autograd.grad(scalar(layer)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(value.square().sum() for value in first), leaves)


def dual(layer: Layer, x: Tensor, weight: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)), forward_ad.make_dual(weight, torch.ones_like(weight)))
        return forward_ad.unpack_dual(y).tangent


DERIVATIVES: dict[str, Callable[[Layer, Tensor, Tensor], Any]] = {
    "jvp": lambda layer, x, weight: func.jvp(lambda x: layer(x, weight), (x,), (torch.ones_like(x),)),
    "jacfwd": lambda layer, x, weight: func.jacfwd(layer, argnums=(0, 1))(x, weight),
    "jacrev": lambda layer, x, weight: func.jacrev(layer, argnums=(0, 1))(x, weight),
    "hessian": lambda layer, x, weight: func.hessian(scalar(layer))(x, weight),
    "vmap": lambda layer, x, weight: func.vmap(layer, in_dims=(None, 0))(x, torch.stack([weight, -weight])),
    "dual": dual,
    "dual with gradients": lambda layer, x, weight: dual(layer, x.clone().requires_grad_(), weight),
    "second order": second_order,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", DERIVATIVES)
def test_derivatives_of_every_mode_are_those_of_the_twin(mode: str) -> None:
    args = linear((3,), 5, 4)

    def at(name: str) -> Layer:
        return lambda x, weight: run(name, args._replace(x=x, weight=weight))

    found, expected = (DERIVATIVES[mode](at(name), args.x, args.weight) for name in ("sparse_linear", "masked_linear"))
    torch.testing.assert_close(found, expected)
    assert any(bool(value.any()) for value in torch.utils._pytree.tree_leaves(expected))


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A linear layer with 9 inputs and 7 outputs that skips inputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, args = name, linear(dtype=torch.float32)
        args = args if name == "sparse_linear" else args.masked()
        self.weight, self.bias = nn.Parameter(args.weight.contiguous()), nn.Parameter(args.bias)
        for part in ("scale", "centre", "levels", "tau"):
            self.register_buffer(part, getattr(args, part))

    def forward(self, x: Tensor) -> Tensor:
        op = getattr(torch.ops.surgeon, self.name)
        y: Tensor = op(x, self.weight, self.bias, self.scale, self.centre, self.levels, self.tau)
        return y


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("lead", [(1,), (3, 5), ()], ids=str)
def test_opcheck(lead: tuple[int, ...], int8: bool) -> None:
    args = linear(lead, dtype=torch.float32, int8=int8).require_grad()
    torch.library.opcheck(torch.ops.surgeon.sparse_linear.default, args)


@both_operators
def test_export_keeps_one_node_and_any_size(name: str, tmp_path: Path) -> None:
    model, x = Layers(name), torch.randn(2, 3, 9)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [f"surgeon.{name}.default"]
    module = exported.module(check_guards=False)
    for shape in ((4, 9), (1, 1), (0, 3)):
        other = torch.randn(*shape, 9)
        torch.testing.assert_close(module(other), model(other))
    module(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, model.weight.grad)

    torch.export.save(exported, tmp_path / "layer.pt2")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "pair.pt")
    code = (
        "import torch, surgeon.kernels.sparse_linear\n"
        "module = torch.export.load('layer.pt2').module(check_guards=False)\n"
        "pair = torch.load('pair.pt')\n"
        "torch.testing.assert_close(module(pair['x']), pair['y'])\n"
        "print('equal')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@both_operators
def test_compile_whole_graph_forward_and_training(name: str) -> None:
    torch.compiler.reset()
    eager, x = Layers(name), torch.randn(3, 5, 9)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (x, torch.randn(2, 8, 9)):
        torch.testing.assert_close(compiled(inputs), eager(inputs))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    torch.testing.assert_close(compiled.weight.grad, eager.weight.grad)


def test_autocast_casts_the_product_but_not_what_selects() -> None:
    args = linear((4,), dtype=torch.float32, scale=False, centre=False)
    # In bfloat16 this tau would be 0.5, and the threshold the first input.
    args = args._replace(tau=torch.tensor(0.501), levels=torch.tensor([0.0, 2.0]))
    args.x[:] = torch.tensor([1.0, 1.01, *[0.0] * 7])
    assert args.tau.bfloat16() == 0.5
    for name in ("sparse_linear", "masked_linear"):
        leaves = args.require_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = run(name, leaves)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), run(name, args), rtol=0.02, atol=0.02)
        found.float().sum().backward()
        assert leaves.weight.grad.dtype == torch.float32
        assert leaves.weight.grad.any(1).tolist() == [False, True, *[False] * 7]


@both_operators
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_flops_are_those_of_all_inputs(name: str, int8: bool) -> None:
    args = linear(dtype=torch.float32, int8=int8)
    with FlopCounterMode(display=False) as counter:
        run(name, args)
    assert counter.get_total_flops() == 2 * 15 * 9 * 7
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        run(name, Linear(*(None if t is None else mode.from_tensor(t) for t in args)))
    assert counter.get_total_flops() == 2 * 15 * 9 * 7


@both_operators
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"weight has 9 inputs, but x is \(3, 8\)"),
        ({"x": torch.zeros(())}, r"x must be floating with at least 1 dimension"),
        ({"x": torch.zeros(3, 9, dtype=torch.int64)}, r"x must be floating.* got torch.int64"),
        ({"x": torch.zeros(3, 9, dtype=torch.float64)}, "weight is torch.float32, expected torch.float64"),
        ({"weight": torch.zeros(9)}, r"weight needs 2 dimensions .* got weight \(9,\)"),
        ({"weight": torch.zeros(9, 7, dtype=torch.int8)}, "w_scale belongs to an int8 weight"),
        ({"w_scale": torch.ones(7)}, "w_scale belongs to an int8 weight and to no other, got weight torch.float32"),
        ({"bias": torch.zeros(9)}, r"bias has shape \(9,\), expected \(7,\)"),
        ({"bias": torch.zeros(7, dtype=torch.float64)}, "bias is torch.float64, expected torch.float32"),
        ({"scale": torch.zeros(7)}, r"scale has shape \(7,\), expected \(9,\)"),
        ({"centre": torch.zeros(9, dtype=torch.int32)}, "centre is torch.int32, expected a floating dtype"),
        ({"levels": torch.zeros(1)}, r"levels 1 of at least 2 values, got .* levels \(1,\)"),
        ({"tau": torch.zeros(1)}, r"tau has shape \(1,\), expected \(\)"),
    ],
)
def test_wrong_arguments_are_named(name: str, changes: dict[str, Tensor], message: str, device: str) -> None:
    args = linear(dtype=torch.float32)._replace(**changes)
    args = Linear(*(None if t is None else t.to(device) for t in args))
    given = args if name == "sparse_linear" or args.weight.dim() != 2 else args.masked()
    with pytest.raises(UsageError, match=message):
        getattr(torch.ops.surgeon, name)(*given)


def test_a_tensor_elsewhere_is_named() -> None:
    args = linear(dtype=torch.float32)
    with FakeTensorMode():
        here = Linear(*(None if t is None else torch.empty(t.shape) for t in args))
        elsewhere = here._replace(levels=torch.empty(33, device="meta"))
        with pytest.raises(UsageError, match="sparse linear: levels is on meta, x on cpu"):
            sparse_linear(*elsewhere)
