"""What the operators compute, against the definition written out in `oracle` and against PyTorch's autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn, selected

from .ffn import WAYS, arguments, forced
from .oracle import oracle

every_way = pytest.mark.parametrize("way", WAYS)
plain_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@settings(max_examples=80, deadline=None)
@given(
    lead=st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(0, 4))),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    gated=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    share=st.sampled_from([0, 0.1, 0.3, 0.6, 1]),
    way=st.sampled_from(sorted(WAYS)),
    seed=st.integers(0, 9),
)
def test_both_operators_are_the_definition(
    lead: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    gated: bool,
    bias: bool,
    activation: str,
    share: float,
    way: str,
    seed: int,
) -> None:
    args = arguments(lead, *sizes, gated=gated, bias=bias, activation=activation, share=share, seed=seed)
    with forced(way):
        found = dynamic_k_ffn(*args)
    expected = oracle(*args)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(masked_ffn(*args), expected)
    assert found.is_contiguous()


@plain_and_gated
@every_way
@pytest.mark.parametrize("lead", [(1,), (3, 5), (0, 4)], ids=str)
def test_gradients_are_those_of_autograd(way: str, gated: bool, lead: tuple[int, ...]) -> None:
    ours, reference = (arguments(lead, gated=gated, activation="silu").require_grad() for _ in range(2))
    weight = torch.linspace(-1, 2, 7, dtype=torch.float64)
    with forced(way):
        (dynamic_k_ffn(*ours) * weight).sum().backward()
    (masked_ffn(*reference) * weight).sum().backward()
    assert len(ours.leaves()) == (7 if gated else 5)
    for mine, theirs in zip(ours.leaves(), reference.leaves(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@plain_and_gated
@pytest.mark.parametrize("way", ["dense", "by expert"])
def test_gradients_are_those_of_finite_differences(way: str, gated: bool) -> None:
    args = arguments((4,), experts=3, neurons=2, d_in=3, d_out=2, gated=gated).require_grad()

    def ffn(*leaves: torch.Tensor) -> torch.Tensor:
        names = [name for name, value in args._asdict().items() if any(value is leaf for leaf in args.leaves())]
        return dynamic_k_ffn(*args._replace(**dict(zip(names, leaves, strict=True))))

    with forced(way):
        assert torch.autograd.gradcheck(ffn, args.leaves())


@pytest.mark.parametrize("frozen", ["weights", "x"])
def test_only_the_gradients_asked_for(frozen: str) -> None:
    args = arguments().require_grad()
    expected = torch.autograd.grad(masked_ffn(*args).sum(), args.leaves())
    for leaf in args.leaves():
        leaf.requires_grad_((leaf is args.x) == (frozen == "weights"))
    dynamic_k_ffn(*args).sum().backward()
    every_leaf = [t for t in args if isinstance(t, torch.Tensor) and t is not args.scores and t is not args.threshold]
    for leaf, gradient in zip(every_leaf, expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@every_way
def test_a_tie_runs(way: str) -> None:
    args = arguments((2,), experts=3)
    args = args._replace(scores=torch.tensor([[0.5, 0.4, 0.6]] * 2), threshold=torch.tensor([0.5, 0.6]))
    assert selected(args.scores, args.threshold).tolist() == [[True, False, True], [False, False, True]]
    with forced(way):
        torch.testing.assert_close(dynamic_k_ffn(*args), oracle(*args))


@plain_and_gated
@every_way
def test_an_expert_may_have_all_tokens(way: str, gated: bool) -> None:
    args = arguments((9,), experts=3, gated=gated)
    args = args._replace(scores=torch.tensor([[1.0, 0.0, t % 2] for t in range(9)]), threshold=torch.full((9,), 0.5))
    with forced(way):
        torch.testing.assert_close(dynamic_k_ffn(*args), oracle(*args))


@plain_and_gated
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_all_experts_are_the_dense_ffn(tokens: int, gated: bool) -> None:
    args = arguments((tokens,), gated=gated, share=1)
    up = F.linear(args.x, args.w1.flatten(0, 1), args.b1.flatten())
    h = F.gelu(up) if not gated else F.gelu(F.linear(args.x, args.gate.flatten(0, 1), args.b_gate.flatten())) * up
    torch.testing.assert_close(dynamic_k_ffn(*args), F.linear(h, args.w2.flatten(0, 1).t(), args.b2))


@every_way
@pytest.mark.parametrize("operator", [dynamic_k_ffn, masked_ffn], ids=["dynamic", "masked"])
def test_no_expert_gives_the_bias_or_zero(way: str, operator: object) -> None:
    with forced(way):
        args = arguments(share=0)
        assert torch.equal(operator(*args), args.b2.expand(3, 5, 7))
        assert torch.equal(operator(*arguments(share=0, bias=False)), torch.zeros(3, 5, 7, dtype=torch.float64))


@every_way
@pytest.mark.parametrize("operator", [dynamic_k_ffn, masked_ffn], ids=["dynamic", "masked"])
@pytest.mark.parametrize("where", ["x", "scores", "threshold"])
def test_a_nan_stays_in_its_row_and_selects_everything(way: str, operator: object, where: str) -> None:
    args = arguments((6,), activation="silu")
    values = getattr(args, where).clone()
    values[2] = float("nan")
    args = args._replace(**{where: values})
    with forced(way):
        found = operator(*args)
    if where == "x":
        assert selected(args.scores, args.threshold)[2].any()
        assert found[2].isnan().all()
    else:
        assert selected(args.scores, args.threshold)[2].all()
    torch.testing.assert_close(found, oracle(*args), equal_nan=True)


@plain_and_gated
@pytest.mark.parametrize("way", ["by expert", "copies"])
def test_experts_nobody_selects_are_not_computed(way: str, gated: bool) -> None:
    args = arguments((7,), gated=gated)
    args.scores[:, [1, 4]] = -1.0
    expected = oracle(*args)
    for weight in (args.w1, args.b1, args.gate, args.b_gate, args.w2):
        if weight is not None:
            weight[[1, 4]] = float("nan")
    args = args.require_grad()
    with forced(way):
        found = dynamic_k_ffn(*args)
    torch.testing.assert_close(found, expected)
    if way == "by expert":
        with forced(way):
            found.sum().backward()
        assert args.x.grad.isfinite().all()
        for gradient in (args.w1.grad, args.b1.grad, args.w2.grad):
            assert not gradient[[1, 4]].any()


def test_one_token_at_realistic_width_skips_too() -> None:
    args = arguments((1,), experts=8, neurons=64, d_in=256, d_out=256, dtype=torch.float32)
    args.scores[0, :6] = -1.0
    args.scores[0, 6:] = 1.0
    expected = oracle(*args)
    args.w1[:6], args.w2[:6] = float("nan"), float("nan")
    torch.testing.assert_close(dynamic_k_ffn(*args), expected.float(), rtol=1e-4, atol=1e-3)


@plain_and_gated
@every_way
def test_inputs_need_not_be_contiguous(way: str, gated: bool) -> None:
    args = arguments(gated=gated).require_grad()

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, torch.full_like(tensor, 9.0)], -1)[..., 0]

    twisted = args._replace(**{k: strided(v) for k, v in args._asdict().items() if isinstance(v, torch.Tensor)})
    assert not twisted.x.is_contiguous()
    assert not twisted.w1.is_contiguous()
    with forced(way):
        found = dynamic_k_ffn(*twisted)
        found.transpose(0, 1).square().sum().backward()
    torch.testing.assert_close(found, oracle(*args))
    expected = torch.autograd.grad(masked_ffn(*args).square().sum(), args.leaves())
    torch.testing.assert_close([leaf.grad for leaf in args.leaves()], list(expected))


@every_way
@pytest.mark.parametrize("tokens", [1, 4])
def test_output_is_new_memory(way: str, tokens: int) -> None:
    args = arguments((tokens,), share=0, d_in=7)
    with forced(way):
        for identity in (args, args._replace(activation="identity", threshold=torch.zeros(tokens))):
            found = dynamic_k_ffn(*identity)
            memory = found.untyped_storage().data_ptr()
            assert memory not in [t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)]


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16])
def test_half_types_lose_no_more_than_one_rounding_per_expert(way: str, dtype: torch.dtype, tokens: int) -> None:
    args = arguments((tokens,), experts=96, neurons=2, d_in=16, d_out=8, share=0.7, dtype=dtype).require_grad()
    reference = args._replace(**{k: v.double() for k, v in args._asdict().items() if isinstance(v, torch.Tensor)})
    expected = masked_ffn(*reference)
    with forced(way):
        found = dynamic_k_ffn(*args)
        gradients = torch.autograd.grad(found.sum(), args.leaves())
    assert found.dtype == dtype
    # Summed in half precision, 67 experts would be off by several times this.
    error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < torch.finfo(dtype).eps
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum(), args.leaves()), strict=True):
        assert mine.dtype == dtype
        close = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert close < 2 * torch.finfo(dtype).eps


def test_single_precision_is_close() -> None:
    args = arguments((40,), experts=16, neurons=8, d_in=32, d_out=32, dtype=torch.float32, gated=True)
    torch.testing.assert_close(dynamic_k_ffn(*args).double(), oracle(*args), rtol=1e-4, atol=1e-3)
