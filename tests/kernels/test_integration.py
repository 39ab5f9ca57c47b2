"""The operators inside PyTorch's machinery: schema checks, export, compile, autocast, FLOP counting, fake tensors."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from surgeon.errors import UsageError
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn, selected

from .ffn import arguments, forced

both_operators = pytest.mark.parametrize("operator", ["dynamic_k_ffn", "masked_ffn"])
plain_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


class RoutedFFN(nn.Module):
    """A dynamic-k FFN with a linear router: d_in 5, d_out 7, 6 experts of 4 neurons."""

    def __init__(self, operator: str, gated: bool = False) -> None:
        super().__init__()
        self.operator, self.activation = operator, "relu"
        args = arguments(gated=gated, dtype=torch.float32)
        self.w1, self.b1, self.w2, self.b2 = map(nn.Parameter, (args.w1, args.b1, args.w2, args.b2))
        self.gate = nn.Parameter(args.gate) if gated else None
        self.router = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        run = getattr(torch.ops.surgeon, self.operator)
        weights = (self.w1, self.b1, self.gate, None, self.w2, self.b2)
        return run(x, scores, 0.5 * scores.amax(-1), *weights, self.activation)


@plain_and_gated
@pytest.mark.parametrize("lead", [(1,), (3, 5)], ids=str)
def test_opcheck(gated: bool, lead: tuple[int, ...]) -> None:
    args = arguments(lead, gated=gated, dtype=torch.float32, activation="silu").require_grad()
    torch.library.opcheck(torch.ops.surgeon.dynamic_k_ffn.default, args)


def test_opcheck_of_the_backward() -> None:
    args = arguments(gated=True, dtype=torch.float32)
    grad = torch.randn(3, 5, 7)
    for need_x, need_weights in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.surgeon.dynamic_k_ffn_backward.default, (grad, *args[:8], args.activation, need_x, need_weights)
        )


@both_operators
def test_export_keeps_one_node_and_any_size(operator: str, tmp_path: Path) -> None:
    model, x = RoutedFFN(operator), torch.randn(2, 3, 5)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("surgeon")] == [f"surgeon.{operator}.default"]
    module = exported.module(check_guards=False)
    for shape in ((4, 9), (1, 1), (0, 3)):
        other = torch.randn(*shape, 5)
        torch.testing.assert_close(module(other), model(other))
    module(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(module.w1.grad, model.w1.grad)

    torch.export.save(exported, tmp_path / "ffn.pt2")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "pair.pt")
    code = (
        "import torch, surgeon.kernels.dynamic_k\n"
        "module = torch.export.load('ffn.pt2').module(check_guards=False)\n"
        "pair = torch.load('pair.pt')\n"
        "torch.testing.assert_close(module(pair['x']), pair['y'])\n"
        "print('equal')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize(
    ("operator", "gated"), [("dynamic_k_ffn", True), ("dynamic_k_ffn", False), ("masked_ffn", True)]
)
def test_compile_whole_graph_forward_and_training(operator: str, gated: bool) -> None:
    torch.compiler.reset()
    eager, x = RoutedFFN(operator, gated), torch.randn(3, 5, 5)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (x, torch.randn(2, 9, 5)):
        torch.testing.assert_close(compiled(inputs), eager(inputs))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for (name, mine), (_, theirs) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        if "router" in name:  # Selection is a step function.
            assert mine.grad is None
            assert theirs.grad is None
        else:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("operator", [dynamic_k_ffn, masked_ffn], ids=["dynamic", "masked"])
def test_autocast_casts_the_products_but_not_the_selection(operator: object) -> None:
    args = arguments(dtype=torch.float32, gated=True)
    # One in 2^10 above its score: these would be ties in bfloat16.
    args = args._replace(threshold=torch.ones(3, 5), scores=torch.full((3, 5, 6), 1 - 2.0**-10)).require_grad()
    args.scores[..., 2] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(*args)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), operator(*args), rtol=0.05, atol=0.2)
    found.float().sum().backward()
    assert args.w1.grad.dtype == torch.float32
    assert args.w1.grad.flatten(1).any(1).tolist() == [e == 2 for e in range(6)]


@both_operators
def test_functional_call(operator: str) -> None:
    model, other, x = RoutedFFN(operator), RoutedFFN(operator), torch.randn(4, 5)
    with torch.no_grad():
        other.w1.mul_(2)
    parameters = dict(other.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), other(x))


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@plain_and_gated
@pytest.mark.parametrize("way", ["by expert", "dense"])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_flops_are_those_of_the_selected_pairs(gated: bool, way: str, share: float) -> None:
    args = arguments(gated=gated, share=share, dtype=torch.float32).require_grad()
    pairs = int(selected(args.scores, args.threshold).sum())
    inward, outward = (10 if gated else 5), 7
    neuron = 2 * 4  # FLOP per multiply-add, times neurons
    with forced(way):
        assert counted(lambda: dynamic_k_ffn(*args)) == pairs * neuron * (inward + outward)
        y = dynamic_k_ffn(*args).sum()
        assert counted(y.backward) == pairs * neuron * 3 * inward + pairs * neuron * 2 * outward
    assert counted(lambda: masked_ffn(*args)) == 15 * 6 * neuron * (inward + outward)


def test_flops_without_values_are_those_of_all_experts() -> None:
    args = arguments(dtype=torch.float32)
    every = 15 * 6 * 2 * 4 * (5 + 7)
    meta = args._replace(**{k: v.to("meta") for k, v in args._asdict().items() if isinstance(v, Tensor)})
    assert counted(lambda: dynamic_k_ffn(*meta)) == every
    with FakeTensorMode() as mode:
        fake = args._replace(**{k: mode.from_tensor(v) for k, v in args._asdict().items() if isinstance(v, Tensor)})
        assert counted(lambda: dynamic_k_ffn(*fake)) == every


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operator", [dynamic_k_ffn, masked_ffn], ids=["dynamic", "masked"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu_new"}, "unknown activation 'gelu_new'; known: relu, gelu"),
        ({"scores": torch.zeros(3, 5, 9)}, r"scores has shape \(3, 5, 9\), expected \(3, 5, 6\)"),
        ({"threshold": torch.zeros(3, 5, 1)}, r"threshold has shape \(3, 5, 1\), expected \(3, 5\)"),
        ({"threshold": torch.zeros(3, 5, dtype=torch.int64)}, "threshold is torch.int64, expected a floating dtype"),
        ({"x": torch.zeros(3, 5, 8)}, r"w1 has shape \(6, 4, 5\), expected \(6, 4, 8\)"),
        ({"x": torch.zeros(3, 5, 5, dtype=torch.float64)}, "w1 is torch.float32, expected torch.float64"),
        ({"x": torch.zeros(())}, "x needs at least 1 dimension"),
        ({"w2": torch.zeros(24, 7)}, "w2 need 3"),
        ({"w2": torch.zeros(6, 5, 7)}, r"w2 has shape \(6, 5, 7\), expected \(6, 4, 7\)"),
        ({"b1": torch.zeros(24)}, r"b1 has shape \(24,\), expected \(6, 4\)"),
        ({"b2": torch.zeros(5)}, r"b2 has shape \(5,\), expected \(7,\)"),
        ({"gate": torch.zeros(6, 4, 7)}, r"gate has shape \(6, 4, 7\), expected \(6, 4, 5\)"),
        ({"b_gate": torch.zeros(6, 4)}, "b_gate was given without gate"),
    ],
)
def test_wrong_arguments_are_named(operator: object, changes: dict[str, object], message: str, device: str) -> None:
    args = arguments(dtype=torch.float32)._replace(**changes)
    args = args._replace(**{k: v.to(device) for k, v in args._asdict().items() if isinstance(v, Tensor)})
    with pytest.raises(UsageError, match=message):
        operator(*args)


def test_a_tensor_elsewhere_is_named() -> None:
    args = arguments(dtype=torch.float32)
    with FakeTensorMode(), pytest.raises(UsageError, match="w1 is on meta, x on cpu"):
        masked_ffn(*args._replace(x=torch.empty(3, 5, 5), w1=torch.empty(6, 4, 5, device="meta")))


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, surgeon.kernels; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
