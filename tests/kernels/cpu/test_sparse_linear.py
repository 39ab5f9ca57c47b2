"""The native kernels of linear layers that skip inputs: what they compute, and where they run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.kernels import cpu
from surgeon.kernels.cpu import linear_crossover
from surgeon.kernels.sparse_linear import kept, masked_linear, sparse_linear, threshold
from tests.kernels.sparse_linear import Linear, linear

ops = torch.ops.surgeon
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
every_set = pytest.mark.parametrize("name", ["amx_bf16", "avx512", "avx2", "portable"])


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Always the kernels, and not the dense product; what they choose and the instruction set are put back."""
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    ops.cpu_take_way("kernels")
    yield
    ops.cpu_take_way("")
    ops.cpu_use_instruction_set(cpu.load().instruction_set)


def use(name: str) -> None:
    if name not in ops.cpu_instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    ops.cpu_use_instruction_set(name)


def error(args: Linear) -> float:
    """The largest difference from float64, relative to the size of what is added up."""
    x, weight, bias, scale, centre, levels, tau, w_scale = args
    wide = weight.double() if w_scale is None else weight.double() * w_scale.double()
    exact = Linear(x.double(), wide, None if bias is None else bias.double(), scale, centre, levels, tau).masked()
    size = (x.double() - (0.0 if centre is None else centre.double())).abs() @ wide.abs()
    size += 1e-6 if bias is None else bias.double().abs()
    found = sparse_linear(*args)
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    difference = (found.double() - masked_linear(*exact)).abs() / size
    return float(difference.max()) if difference.numel() else 0.0


@settings(max_examples=200, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (2,), (3,), (2, 2), (7,), (16,), (17,), (0, 3)]),
    d_in=st.sampled_from([1, 3, 8, 16, 31, 100, 411]),
    d_out=st.sampled_from([1, 5, 8, 16, 24, 33, 97, 700]),
    tau=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    optional=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from(list(ROUNDING)),
    way=st.sampled_from(["kernels", "kernels", "dense", ""]),
    threads=st.sampled_from([1, 2]),
    place=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_every_instruction_set_computes_the_definition(
    lead: tuple[int, ...],
    d_in: int,
    d_out: int,
    tau: float,
    optional: tuple[bool, ...],
    dtype: torch.dtype,
    way: str,
    threads: int,
    place: int,
    seed: int,
) -> None:
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    ops.cpu_take_way(way)
    bias, scale, centre, int8 = optional
    args = linear(lead, d_in, d_out, tau=tau, bias=bias, scale=scale, centre=centre, int8=int8, dtype=dtype, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error(args) < ROUNDING[dtype]
    finally:
        torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_several_threads_and_blocks_of_columns(tokens: int, int8: bool, dtype: torch.dtype) -> None:
    args = linear((tokens,), 300, 5003, dtype=dtype, int8=int8)
    one = sparse_linear(*args)
    assert error(args) < ROUNDING[dtype]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(sparse_linear(*args), one)
    finally:
        torch.set_num_threads(before)


@every_set
@every_dtype
@pytest.mark.parametrize("way", ["kernels", "dense"])
def test_the_same_inputs_are_kept_as_in_torch(way: str, dtype: torch.dtype, name: str) -> None:
    """Also next to the threshold: the layer is the identity, which shows them."""
    use(name)
    ops.cpu_take_way(way)
    levels, integers = torch.linspace(0, 1, 9) ** 2, torch.int32 if dtype == torch.float32 else torch.int16
    for tau in (torch.tensor(value) for value in (0.0, 0.25, 0.3, 0.77, 1.0)):
        near = torch.tensor([2.0**-10, 0.1, 0.5, 1.0])
        near[1] = threshold(levels, tau).clamp(min=2.0**-10)
        bits = near.to(dtype).view(integers)
        x = torch.cat([(bits + step).view(dtype) * sign for sign in (1, -1) for step in (-1, 0, 1)])
        for scale, centre in ((None, None), (torch.full((len(x),), 0.5), torch.linspace(-1, 1, len(x)))):
            keep = kept(x, scale, centre, levels, tau)
            assert keep.any() or scale is not None
            deviation = x.float() - (0.0 if centre is None else centre)
            found = sparse_linear(x, torch.eye(len(x), dtype=dtype), None, scale, centre, levels, tau)
            assert torch.equal(found, torch.where(keep, deviation, 0.0).to(dtype))


@every_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_half_numbers_are_read_and_rounded(dtype: torch.dtype, name: str) -> None:
    use(name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    levels, tau = torch.tensor([0.0, 1.0]), torch.zeros(())
    # A quarter of the smallest numbers has to be rounded.
    for shift, factor in ((0, 1.0), (1, 1.0), (7001, 1.0), (7001, 0.25)):
        x, weight = torch.tensor([1.0, factor], dtype=dtype), torch.stack([every, every.roll(shift)])
        expected = (weight[0].float() + factor * weight[1].float()).to(dtype)
        found = sparse_linear(x, weight, None, None, None, levels, tau)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_set
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_tau_that_is_nan_keeps_all_inputs_and_no_more(tokens: int, name: str) -> None:
    use(name)
    args = linear((tokens,), 37, 40, dtype=torch.float32, tau=float("nan"))
    behind = torch.full((64, 40), float("nan"))
    behind[:37] = args.weight
    found = sparse_linear(*args._replace(weight=behind[:37]))
    torch.testing.assert_close(found, (args.x - args.centre) @ args.weight + args.bias, rtol=1e-5, atol=1e-5)


@every_set
@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_that_no_token_keeps_are_not_read(tokens: int, name: str) -> None:
    use(name)
    args = linear((tokens,), 50, 40, dtype=torch.float32)
    skipped = ~kept(args.x, args.scale, args.centre, args.levels, args.tau).any(0)
    assert skipped.any()
    expected = sparse_linear(*args)
    args.weight[skipped] = float("nan")
    assert torch.equal(sparse_linear(*args), expected)


@every_set
@every_dtype
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_token_that_is_nan_stays_nan_and_alone(tokens: int, dtype: torch.dtype, name: str) -> None:
    use(name)
    # At other widths oneDNN's own product of bfloat16 by AMX spreads it over two rows.
    args = linear((tokens,), 64, 40, tau=1.0, dtype=dtype)
    args.x[1, 7] = float("nan")
    found = sparse_linear(*args)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@every_dtype
def test_views_need_not_be_aligned_or_contiguous(dtype: torch.dtype) -> None:
    args = linear((5,), 33, 21, dtype=dtype)
    expected = sparse_linear(*args)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 1], -1)[..., 0]

    for change in (moved, strided):
        other = Linear(*(t if t is None or not t.dim() else change(t) for t in args))
        assert torch.equal(sparse_linear(*other), expected)


def test_numbers_that_select_may_have_any_dtype() -> None:
    args = linear((2,), dtype=torch.bfloat16)
    wide = args._replace(**{name: getattr(args, name).double() for name in ("scale", "centre", "levels", "tau")})
    assert torch.equal(sparse_linear(*wide), sparse_linear(*args))


def test_a_gradient_goes_through_the_kernels_and_back() -> None:
    args = linear((2,), 50, 40, dtype=torch.float32)
    skipped = ~kept(args.x, args.scale, args.centre, args.levels, args.tau).any(0)
    args.weight[skipped] = float("inf")  # the dense product would give NaN
    leaves = args.require_grad()
    y = sparse_linear(*leaves)
    assert torch.equal(y, sparse_linear(*args))
    y.sum().backward()
    assert leaves.x.grad.isfinite().all()
    assert leaves.weight.grad[skipped].eq(0).all()


def is_dense(tokens: int, dtype: torch.dtype) -> bool:
    """Which way a call goes that keeps half of the rows: the dense product reads the others too."""
    weight = torch.ones(8, 4, dtype=dtype)
    weight[4:] = float("inf")
    x = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=dtype).expand(tokens, 8)
    return bool(sparse_linear(x, weight, None, None, None, torch.tensor([0.0, 1.0]), torch.zeros(())).isnan().any())


@every_dtype
def test_the_dense_product_is_taken_where_it_was_faster(dtype: torch.dtype) -> None:
    ops.cpu_take_way("")
    before = {tokens: ops.cpu_get_linear_crossover(dtype, tokens) for tokens in linear_crossover.TOKENS}
    try:
        for tokens in linear_crossover.TOKENS:
            ops.cpu_set_linear_crossover(dtype, tokens, 0.75 if tokens < 8 else 0.25)
        assert [is_dense(tokens, dtype) for tokens in (1, 2, 3, 4, 5, 16, 17)] == 4 * [False] + 3 * [True]
    finally:
        for tokens, share in before.items():
            ops.cpu_set_linear_crossover(dtype, tokens, share)


def test_crossovers_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure() -> Iterator[tuple[str, int, float]]:
        measured.append(None)
        yield "int8", 8, 0.625

    before = ops.cpu_get_linear_crossover(torch.int8, 8)
    monkeypatch.setattr(linear_crossover, "measure", measure)
    try:
        for content in (None, "[", json.dumps({"no such machine": []})):
            if content:
                (tmp_path / "linear_crossover.json").write_text(content)
            for _ in range(2):
                ops.cpu_set_linear_crossover(torch.int8, 8, 0.25)
                linear_crossover.load(tmp_path)
                assert ops.cpu_get_linear_crossover(torch.int8, 8) == 0.625
        assert len(measured) == 3
    finally:
        ops.cpu_set_linear_crossover(torch.int8, 8, before)


def test_a_measurement_has_every_dtype_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_crossover, "dense_over_ours", lambda call, share: call() or 1.5)
    monkeypatch.setattr(linear_crossover, "_LAYERS", 1)
    found = list(linear_crossover.measure())
    assert [(name, tokens) for name, tokens, _ in found] == [
        (name, tokens) for name in linear_crossover.WEIGHTS for tokens in linear_crossover.TOKENS
    ]
    assert all(share == 1.0 for *_, share in found)
    assert all(map(linear_crossover._is_share, map(list, found)))
