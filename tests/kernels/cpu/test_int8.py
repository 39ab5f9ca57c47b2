"""The native kernels for experts with 8-bit weights."""

import shutil
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.kernels import cpu
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.dynamic_k import dynamic_k_ffn  # noqa: F401  the library needs it
from surgeon.kernels.int8 import routed_ffn_int8, router_scores_int8
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.selection import RULES
from tests.kernels.cpu import int8_mutants as mutants
from tests.kernels.int8_calls import DTYPES, HIDDEN, OUTPUT, STEP, agree, errors, int8_call, oracle, oracle_scores

ops = torch.ops.surgeon


@pytest.fixture(scope="module", autouse=True)
def _native() -> Iterator[None]:
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    yield
    ops.cpu_use_instruction_set(cpu.load().instruction_set)


def use(place: int, threads: int = 1) -> None:
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    torch.set_num_threads(threads)


SHAPES = {
    "experts": st.sampled_from([1, 2, 5, 9, 70]),
    "neurons": st.sampled_from([1, 4, 13, 16, 24, 32, 33, 64, 100]),
    "d_in": st.sampled_from([1, 3, 8, 31, 64, 100, 411]),
    "d_out": st.sampled_from([1, 5, 16, 33, 97, 200]),
    "width": st.sampled_from([None, 1, 8, 20, 64]),
    "rule": st.sampled_from(RULES),
    "tau": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "scaled": st.booleans(),
    "activation": st.sampled_from(sorted(ACTIVATIONS)),
    "hidden": st.sampled_from(sorted(HIDDEN)),
    "output": st.sampled_from(sorted(OUTPUT)),
    "dtype": st.sampled_from(list(DTYPES)),
    "group": st.sampled_from([None, 8, 16, 32, 40]),
    "seed": st.integers(0, 9),
}


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.fixed_dictionaries(SHAPES),
    lead=st.sampled_from([(), (1,), (3,), (2, 4), (16,), (31,), (70,), (300,)]),
    shared=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    place=st.integers(0, 9),
)
def test_every_instruction_set_computes_what_the_plain_twin_does(
    shapes: dict[str, object], lead: tuple[int, ...], shared: bool, threads: int, place: int
) -> None:
    use(place, threads)
    call = int8_call(lead, shared=int(shared and shapes["experts"] != 1), **shapes)  # type: ignore[arg-type]
    scores, wanted_scores = router_scores_int8(*call.router), ops.router_scores_int8_torch(*call.router)
    assert scores.dtype == torch.float32
    assert scores.shape == wanted_scores.shape
    # A step of an input to the trunk is a twenty-thousandth of the largest; the scores of exp grow with it.
    assert float(((scores - wanted_scores).abs() / (1 + wanted_scores)).max()) < 3e-3
    found, wanted = routed_ffn_int8(*call), ops.routed_ffn_int8_torch(*call)
    assert found.dtype == call.x.dtype
    assert found.shape == wanted.shape
    # Scores next to the threshold may fall on either side of it.
    same = errors(found.view(-1, wanted.shape[-1]), wanted.view(-1, wanted.shape[-1])) < STEP
    assert float(same.double().mean()) > 0.9 or len(same) < 10


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.fixed_dictionaries(
        SHAPES
        | {
            "experts": st.sampled_from([2, 5]),
            "neurons": st.sampled_from([1, 5, 16, 18]),
            "d_in": st.sampled_from([1, 7, 40]),
            "d_out": st.sampled_from([1, 9, 17]),
            "width": st.sampled_from([None, 3]),
        }
    ),
    shared=st.integers(0, 1),
    place=st.integers(0, 9),
)
def test_they_compute_the_definition(shapes: dict[str, object], shared: int, place: int) -> None:
    use(place)
    call = int8_call((10,), shared=shared, **shapes)  # type: ignore[arg-type]
    scores = router_scores_int8(*call.router)
    wanted = oracle_scores(call)
    # In float32 the exponential of a score below -1.7 times 50 is none that the kernels tell from others.
    assert float(((scores.double() - wanted).abs() / (1 + wanted)).max()) < 3e-3
    agree(routed_ffn_int8(*call), oracle(call, scores), call.x.dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("place", range(7))
def test_every_activation(place: int, activation: str, gated: bool) -> None:
    use(place)
    call = int8_call((20,), 3, 32, 64, 48, tau=0.0, activation=activation, gated=gated)
    agree(routed_ffn_int8(*call), ops.routed_ffn_int8_torch(*call), torch.float32)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-7])
@pytest.mark.parametrize("place", range(7))
def test_a_trunk_of_tanh_is_exact_near_zero(place: int, factor: float) -> None:
    use(place)
    call = int8_call((9,), 4, 16, 8, 8, hidden="tanh", bias=False)
    router = call._replace(x=call.x * factor).router
    torch.testing.assert_close(
        router_scores_int8(*router), ops.router_scores_int8_torch(*router), rtol=1e-3, atol=1e-5 * factor
    )


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("place", range(7))
def test_any_number_of_tokens_of_an_expert(place: int, count: int) -> None:
    """They are taken some at a time, and every number of those that are left has code of its own."""
    use(place)
    for activation, group in product(("relu", "gelu"), (None, 32)):  # hidden values without a sign and with one
        call = int8_call((count,), 2, 40, 70, 50, tau=0.0, activation=activation, group=group, seed=count)
        agree(routed_ffn_int8(*call), ops.routed_ffn_int8_torch(*call), torch.float32)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 32, 33])
def test_threads_share_the_experts_of_few_tokens(tokens: int, threads: int, group: int | None) -> None:
    """With enough weights for each of them."""
    use(0, threads)
    call = int8_call((tokens,), 90, 64, 100, 100, activation="gelu", group=group)
    agree(routed_ffn_int8(*call), ops.routed_ffn_int8_torch(*call), torch.float32)


@pytest.mark.parametrize("place", range(7))
def test_sums_of_the_largest_numbers_are_exact(place: int) -> None:
    """Pairs of the largest products are too large for 16 bits."""
    use(place)
    call = int8_call((2,), 1, 16, 512, 16, width=None, tau=0.0, bias=False, activation="relu")
    full = torch.full_like(call.w1, 127)
    call = call._replace(x=torch.ones(2, 512), w1=full, w1_scale=torch.ones(1, 16), w2=torch.full_like(call.w2, -127))
    call = call._replace(w2_scale=torch.ones(1, 16), y_scale=torch.ones(16))
    expected = 512.0 * 127 * 16 * -127
    torch.testing.assert_close(routed_ffn_int8(*call), torch.full((2, 16), expected), rtol=1e-5, atol=0)
    signed = call._replace(activation="identity", w1=-full)
    torch.testing.assert_close(routed_ffn_int8(*signed), torch.full((2, 16), -expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("half", [-7, 7])
def test_sums_of_the_largest_numbers_of_4_bits_are_exact(place: int, half: int) -> None:
    use(place)
    for tokens in (1, 40):  # multiplied as they are, and unpacked first
        call = int8_call((tokens,), 1, 16, 512, 16, width=None, tau=0.0, bias=False, activation="identity", group=512)
        assert call.w1_group is not None
        assert call.w2_group is not None
        call = call._replace(
            x=torch.ones(tokens, 512),
            w1=torch.full_like(call.w1, (half + 8) * 17),  # both halves of a byte
            w2=torch.full_like(call.w2, (half + 8) * 17),
            w1_group=torch.full_like(call.w1_group, 17),
            w2_group=torch.full_like(call.w2_group, 17),
            w1_scale=torch.ones(1, 16),
            w2_scale=torch.ones(1, 16),
            y_scale=torch.ones(16),
        )
        expected = torch.full((tokens, 16), 512.0 * 17 * half * 16 * 17 * half)
        torch.testing.assert_close(routed_ffn_int8(*call), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(ops.routed_ffn_int8_torch(*call), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("place", range(7))
def test_weights_of_4_bits_compute_what_the_8_bits_do_that_they_stand_for(place: int) -> None:
    use(place)
    for tokens in (1, 7, 60):
        call = int8_call((tokens,), 4, 40, 70, 50, gated=True, activation="gelu", group=24)
        whole = call._replace(**call.experts.in_8_bits(70)._asdict())
        torch.testing.assert_close(routed_ffn_int8(*call), routed_ffn_int8(*whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(7))
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(
    place: int, value: float, tokens: int
) -> None:
    for threads in (1, 2):
        use(place, threads)
        call = int8_call((tokens,), 9, 16, 32, 64, scaled=True)
        clean = routed_ffn_int8(*call)
        call.x[1, 7] = value
        found, scores = routed_ffn_int8(*call), router_scores_int8(*call.router)
        assert found[1].isnan().all()
        assert scores[1].isnan().all()
        others = torch.arange(tokens) != 1
        torch.testing.assert_close(found[others], clean[others], rtol=1e-5, atol=1e-5)
        assert scores[others].isfinite().all()


def test_tokens_and_hidden_values_that_are_zero() -> None:
    for place, group in product(range(7), (None, 16)):
        use(place)
        call = int8_call((4,), 3, 16, 32, 20, tau=0.0, group=group)
        call.x[2] = 0
        agree(routed_ffn_int8(*call), ops.routed_ffn_int8_torch(*call), torch.float32)
        dead = call._replace(b1=torch.full_like(call.w1_scale, -1e6))
        assert torch.equal(routed_ffn_int8(*dead), dead.b2.expand(4, 20))  # type: ignore[union-attr]


def test_hidden_values_that_overflow_give_nan() -> None:
    use(0)
    call = int8_call((3,), 2, 16, 32, 20, tau=0.0, activation="relu2", bias=False)
    call = call._replace(w1_scale=call.w1_scale * 1e25)
    assert routed_ffn_int8(*call).isnan().all()
    assert ops.routed_ffn_int8_torch(*call).isnan().all()


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
def test_no_tokens(lead: tuple[int, ...]) -> None:
    use(0, 2)
    call = int8_call(lead)
    assert routed_ffn_int8(*call).shape == (*lead, 7)
    assert router_scores_int8(*call.router).shape == (*lead, 6)


def test_scales_of_other_dtypes_and_operands_that_are_not_contiguous() -> None:
    use(0)
    call = int8_call((40,), 6, 16, 32, 24, gated=True, scaled=True, width=20)
    kept = {name: value for name, value in call._asdict().items() if isinstance(value, Tensor)}
    halves = {name: t.bfloat16().float() for name, t in kept.items() if t.is_floating_point() and name != "x"}
    rounded = call._replace(**halves)
    twisted = rounded._replace(
        **{name: t.bfloat16() for name, t in halves.items()},
        x=call.x.t().contiguous().t(),
        w1=call.w1.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(routed_ffn_int8(*twisted), routed_ffn_int8(*rounded))


def test_what_they_do_not_take_goes_to_the_plain_twin() -> None:
    use(0)
    call = int8_call((3,))
    halves = int8_call((3,), d_in=20, gated=True, group=8)
    double = call._replace(x=call.x.double())
    assert routed_ffn_int8(*double).dtype == torch.float64
    for wrong, what in (
        (call._replace(w2=call.w2[1:]), "w2 has shape"),
        (call._replace(shared=1), "are shared"),
        (call._replace(fc1=call.fc1.float()), "expected torch.int16"),  # type: ignore[union-attr]
        (call._replace(activation="swoosh"), "unknown activation"),
        (call._replace(rule="some"), "No selection rule"),
        (call._replace(output="some"), "no router"),
        (halves._replace(w2_group=None), "belong together"),
        (halves._replace(gate_group=None), "belong together"),
        (call._replace(w1_group=halves.w1_group), "belong together"),
        (halves._replace(w1=call.w1), "w1 has shape"),
        (halves._replace(w2=halves.w2.to(torch.int8)), "expected torch.uint8"),
        (halves._replace(w1_group=halves.w1_group.to(torch.int8)), "expected torch.uint8"),  # type: ignore[union-attr]
        (halves._replace(w1_group=halves.w1_group.repeat(1, 1, 3, 1)), "w1_group has shape"),  # type: ignore[union-attr]
        (halves._replace(gate_group=halves.gate_group[:, :, :1]), "gate_group has shape"),  # type: ignore[index]
        (halves._replace(w2_group=halves.w2_group[0]), "w2_group has shape"),  # type: ignore[index]
        (halves._replace(w2_group=halves.w2_group[:, :, :0]), "w2_group has shape"),  # type: ignore[index]
    ):
        with pytest.raises(UsageError, match=what):
            routed_ffn_int8(*wrong)
    with pytest.raises(UsageError, match="no router"):
        router_scores_int8(*call._replace(hidden="some").router)


def test_more_products_than_32_bits_may_hold_are_refused() -> None:
    use(0)
    for shape in ({"d_in": 2**16 + 4}, {"neurons": 2**16 + 16}):
        with pytest.raises(UsageError, match="at most 65536 inputs"):
            routed_ffn_int8(*int8_call((1,), 1, width=None, **shape))


@pytest.mark.parametrize("group", [None, 8])
def test_a_gradient_goes_through_the_native_kernels(group: int | None) -> None:
    use(0)
    call = int8_call((20,), 5, 16, 32, 24, activation="gelu", group=group)
    x = call.x.clone().requires_grad_()
    found = routed_ffn_int8(*call._replace(x=x))
    assert torch.equal(found, routed_ffn_int8(*call))
    (gradient,) = torch.autograd.grad(found.square().sum(), [x])
    assert gradient.isfinite().all()
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("group", [None, 8])
def test_it_compiles_whole(group: int | None) -> None:
    use(0)
    call = int8_call((40,), 5, 16, 32, 24, group=group)
    compiled = torch.compile(lambda *given: routed_ffn_int8(*given) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), routed_ffn_int8(*call) * 2)
    torch.library.opcheck(routed_ffn_int8, tuple(call), test_utils=("test_schema", "test_faketensor"))


def test_several_threads_at_once() -> None:
    use(0, 2)
    calls: list[Int8Call] = [int8_call((tokens,), 8, 32, 64, 48) for tokens in (3, 300)]
    expected = [routed_ffn_int8(*call) for call in calls]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = [routed_ffn_int8(*call) for _ in range(20) for call in calls]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(y, expected[i % 2]) for many in found.values() for i, y in enumerate(many))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["int8_portable", mutants.VNNI, mutants.AMX])
def test_broken_kernels_are_noticed(kernels: str, tmp_path: Path) -> None:
    needed = {mutants.VNNI: "avx512_vnni", mutants.AMX: "amx_bf16"}.get(kernels, "portable")
    if shutil.which("c++") is None or needed not in ops.cpu_instruction_sets():
        pytest.skip("needs c++ and a processor that has the instructions")
    assert not mutants.noticed(mutants.build(tmp_path / "original", kernels, None), STEP)
    for i, mutant in enumerate(mutants.MUTANTS):
        if mutant.kernels == kernels:
            library = mutants.build(tmp_path / str(i), kernels, mutant)
            assert mutants.noticed(library, STEP), mutant.name
