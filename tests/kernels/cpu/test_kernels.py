"""The native kernels: what they compute, and where they run."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.kernels import cpu
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn
from tests.kernels.ffn import Arguments, arguments

ROOT = Path(__file__).parents[3]

ops = torch.ops.surgeon


@pytest.fixture(scope="module", autouse=True)
def _native() -> Iterator[None]:
    """These kernels; the way they choose and the best instruction set are put back at the end."""
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    yield
    ops.cpu_take_way("")
    ops.cpu_use_instruction_set(cpu.load().instruction_set)


def always(dense: bool) -> None:
    ops.cpu_take_way("dense" if dense else "kernels")


def exact(args: Arguments) -> torch.Tensor:
    return masked_ffn(*(value.double() if isinstance(value, torch.Tensor) else value for value in args))


def magnitude(args: Arguments) -> torch.Tensor:
    """The size of what is added up, which rounding is relative to."""
    sizes = (value.double().abs() if isinstance(value, torch.Tensor) else value for value in args)
    x, _, _, w1, b1, gate, b_gate, w2, b2, activation = sizes
    ones = torch.ones(*x.shape[:-1], w1.shape[0])
    bound = activation if activation == "relu2" else "softplus"  # above the size of all others
    return 1.0 + masked_ffn(x, ones, ones[..., 0], w1, b1, gate, b_gate, w2, b2, bound)


@settings(max_examples=150, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 4), (16,), (17,), (40,), (64,), (0, 3), (600,)]),
    experts=st.sampled_from([1, 2, 5, 9, 64, 70, 130]),
    neurons=st.sampled_from([1, 3, 4, 6, 8, 13, 24, 33, 60, 64, 96]),
    d_in=st.sampled_from([1, 3, 8, 16, 31, 34, 64, 100, 411, 600]),
    d_out=st.sampled_from([1, 5, 8, 16, 24, 33, 97, 200]),
    gated=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    share=st.sampled_from([0, 0.1, 0.5, 1]),
    dense=st.booleans(),
    threads=st.sampled_from([1, 2]),
    place=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_every_instruction_set_computes_the_definition(
    lead: tuple[int, ...],
    experts: int,
    neurons: int,
    d_in: int,
    d_out: int,
    gated: bool,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    share: float,
    dense: bool,
    threads: int,
    place: int,
    seed: int,
) -> None:
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    always(dense)
    args = arguments(
        lead, experts, neurons, d_in, d_out, gated=gated, bias=bias, activation=activation, share=share, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = dynamic_k_ffn(*args)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    assert found.is_contiguous()
    rounding = 2e-6 if dtype == torch.float32 else 1e-2
    error = (found.double() - exact(args)).abs() / magnitude(args)
    assert error.numel() == 0 or float(error.max()) < rounding


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("place", range(5))
def test_activations_far_from_zero(place: int, activation: str) -> None:
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    far = torch.tensor([0.0, 1e-30, 0.1, 1.0, 3.0, 5.0, 8.0, 12.9, 13.1, 20.0, 88.0, 90.0, 200.0, 1e4])
    x = torch.cat([far, -far, torch.tensor([float("nan")])])[:, None]
    scores, threshold, one = torch.ones(len(x), 1), torch.zeros(len(x)), torch.ones(1, 1, 1)
    expected = ACTIVATIONS[activation].fn(x.double())
    for dense in (False, True):
        always(dense)
        found = dynamic_k_ffn(x, scores, threshold, one, None, None, None, one, None, activation)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neurons", [1, 15, 16, 17, 24, 31, 32, 33, 100])
@pytest.mark.parametrize("place", range(5))
def test_the_dense_product_leaves_out_what_is_not_selected(place: int, neurons: int, dtype: torch.dtype) -> None:
    """Experts are cleared in ways that depend on their size; the last neurons may be no whole vector."""
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    always(dense=True)
    for gated in (False, True):
        args = arguments((20,), 9, neurons, 16, 24, gated=gated, bias=True, activation="gelu", share=0.5, dtype=dtype)
        rounding = 2e-6 if dtype == torch.float32 else 1e-2
        assert float(((dynamic_k_ffn(*args).double() - exact(args)).abs() / magnitude(args)).max()) < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d_out", "share"), [(1201, 0.5), (1201, 0.05), (96, 0.5)])
@pytest.mark.parametrize("place", range(5))
def test_outputs_of_some_columns_at_a_time_and_of_whole_rows(
    place: int, d_out: int, share: float, dtype: torch.dtype
) -> None:
    """With many tokens of an expert, and sums too large for the cache, they go through panels of columns."""
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    always(dense=False)
    args = arguments((1100,), 3, 33, 40, d_out, gated=True, activation="silu", share=share, dtype=dtype)
    rounding = 2e-6 if dtype == torch.float32 else 1e-2
    assert float(((dynamic_k_ffn(*args).double() - exact(args)).abs() / magnitude(args)).max()) < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 300])
def test_a_token_that_is_nan_stays_nan_and_alone(dtype: torch.dtype, tokens: int) -> None:
    always(dense=False)
    args = arguments((tokens,), 4, 16, 32, 64, dtype=dtype, activation="relu")
    clean = dynamic_k_ffn(*args)
    args.x[1], args.scores[1], args.threshold[1] = float("nan"), float("nan"), float("nan")
    found = dynamic_k_ffn(*args)
    assert found[1].isnan().all()
    others = torch.arange(tokens) != 1
    # Not bit for bit: beside a token that selects all, the others' neurons are added up in another order.
    torch.testing.assert_close(found[others], clean[others], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_ties_run_and_the_last_below_the_threshold_does_not() -> None:
    always(dense=False)
    args = arguments((2,), 3, 4, 5, 6, dtype=torch.float32)
    scores = torch.tensor([[0.5, 0.5, 0.25], [1.0, torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)), 0.5]])
    args = args._replace(scores=scores, threshold=torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(dynamic_k_ffn(*args).double(), exact(args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scores", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_another_dtype_select_the_same(scores: torch.dtype) -> None:
    always(dense=False)
    args = arguments((40,), dtype=torch.float32)
    args = args._replace(scores=args.scores.to(scores), threshold=args.threshold.to(scores))
    torch.testing.assert_close(dynamic_k_ffn(*args).double(), exact(args), rtol=1e-5, atol=1e-5)


def test_weights_and_inputs_that_are_not_contiguous() -> None:
    always(dense=False)
    args = arguments((40,), 6, 8, 16, 24, gated=True, dtype=torch.float32)
    twisted = args._replace(
        x=args.x.t().contiguous().t(),
        w1=args.w1.transpose(0, 2).contiguous().transpose(0, 2),
        w2=args.w2.transpose(1, 2).contiguous().transpose(1, 2),
        scores=args.scores.t().contiguous().t(),
    )
    assert torch.equal(dynamic_k_ffn(*twisted), dynamic_k_ffn(*args))


def test_what_they_do_not_take_goes_to_torch() -> None:
    args = arguments((3,), dtype=torch.float64)
    torch.testing.assert_close(dynamic_k_ffn(*args), exact(args))
    half = arguments((3,), dtype=torch.float16)
    assert dynamic_k_ffn(*half).dtype == torch.float16
    wrong = arguments((3,), dtype=torch.float32)
    with pytest.raises(UsageError, match="w2 has shape"):
        dynamic_k_ffn(*wrong._replace(w2=wrong.w2[1:]))
    with pytest.raises(UsageError, match="unknown activation"):
        dynamic_k_ffn(*wrong._replace(activation="swoosh"))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_gradients(gated: bool, bias: bool) -> None:
    always(dense=False)
    ours, reference = (
        arguments((20,), 5, 4, 6, 7, gated=gated, bias=bias, activation="silu", dtype=torch.float32).require_grad()
        for _ in range(2)
    )
    dynamic_k_ffn(*ours).square().sum().backward()
    masked_ffn(*reference).square().sum().backward()
    for mine, theirs in zip(ours.leaves(), reference.leaves(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_only_some_gradients() -> None:
    always(dense=False)
    args = arguments((20,), dtype=torch.float32)
    for name in ("x", "b1", "w2", "b2"):
        leaf = getattr(args, name).detach().requires_grad_()
        one = args._replace(**{name: leaf})
        (found,) = torch.autograd.grad(dynamic_k_ffn(*one).sum(), [leaf])
        (expected,) = torch.autograd.grad(masked_ffn(*one).sum(), [leaf])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_compiles_whole_and_counts_its_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    args = arguments((40,), dtype=torch.float32)
    compiled = torch.compile(lambda *a: dynamic_k_ffn(*a) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), dynamic_k_ffn(*args) * 2)
    with FlopCounterMode(display=False) as counter:
        dynamic_k_ffn(*args)
    pairs = int((~(args.scores < args.threshold.unsqueeze(-1))).sum())
    assert counter.get_total_flops() == pairs * 2 * 4 * (5 + 7)
    torch.library.opcheck(dynamic_k_ffn, args, test_utils=("test_schema", "test_faketensor"))


def test_several_threads_at_once() -> None:
    always(dense=False)
    args = arguments((300,), 8, 16, 32, 48, dtype=torch.float32)
    expected, found = dynamic_k_ffn(*args), {}

    def work(number: int) -> None:
        found[number] = [dynamic_k_ffn(*args) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(one, expected) for many in found.values() for one in many)


class _InWorkers(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, args: Arguments) -> None:
        self.args = args

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> torch.Tensor:
        return dynamic_k_ffn(*self.args)


def in_forked_workers() -> None:
    assert cpu.ready()
    always(dense=False)
    args = arguments((30,), dtype=torch.float32)
    expected = dynamic_k_ffn(*args)
    loader = torch.utils.data.DataLoader(
        _InWorkers(args), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    assert all(torch.equal(found, expected) for found in loader)


def test_in_forked_workers_of_a_data_loader() -> None:
    # In a process of its own: that of the tests has threads of other libraries, which do not outlive a fork.
    code = "from tests.kernels.cpu.test_kernels import in_forked_workers; in_forked_workers()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- building and finding ---------------------------------------------------------------------------------------------
