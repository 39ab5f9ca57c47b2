"""The low rank that refit gives to linear layers that skip inputs: what it is worth, what it costs, where it goes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.dynamic.knobs import get_tau
from surgeon.errors import UsageError
from surgeon.inputs.fitting import fit
from surgeon.inputs.module import SparseLinear
from surgeon.inputs.site import add_low_rank, find_sparse_linears
from surgeon.kernels.sparse_linear import add_low_rank as operator
from surgeon.kernels.sparse_linear import ordinary_ops
from surgeon.measure.meter import measure
from surgeon.measure.sweep import layers_share
from surgeon.passes import Lower, Recover, Refit, SparsifyInputs
from surgeon.passes.report import dense_layers
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import WIDTH, Function, stack, vectors

TAU = 0.6


def factors(seed: int = 0, batches: int = 40) -> list[dict[str, Tensor]]:
    """Inputs of a `Stack` of which most is known from two numbers, and the rest is independent."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    mix = 2 * torch.randn(2, WIDTH, generator=fixed)

    def normal(width: int) -> Tensor:
        return torch.randn(8, 5, width, generator=generator)

    return [{"x": normal(2) @ mix + 0.3 * normal(WIDTH) + 0.5} for _ in range(batches)]


def refitted(kind: str = "gelu", *after: surgeon.Pass, **options: float) -> Surgery:
    passes = [SparsifyInputs(tau=TAU), Refit(**{"rank": 0.25} | options), *after]
    return Pipeline(passes).run(stack(kind), inputs=vectors(), data=factors())


def ranks(surgery: Surgery) -> dict[str, int]:
    return {site.path: site.rank for site in find_sparse_linears(surgery.graph)}


# --- the fit ----------------------------------------------------------------------------------------------------------


def problem(d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated deviations that are not centred, and those of them that are large; float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight, d = normal(d_out, d_in), normal(400, d_in) @ normal(d_in, d_in) + 0.5
    return weight, d, torch.where(d.abs() > d.abs().median(), d, 0.0)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_no_other_weights_come_nearer(d_in: int, d_out: int, rank: int) -> None:
    weight, d, s = problem(d_in, d_out)
    found = fit(weight, d, s, rank, 1e-9)
    assert found.low_in.shape == (rank, d_in)
    assert found.low_out.shape == (d_out, rank)
    parts = [part.clone().requires_grad_() for part in (found.read, found.low_in, found.low_out, found.offset)]

    def error() -> Tensor:
        read, low_in, low_out, offset = parts
        return (d @ (weight - low_out @ low_in).t() - s @ read.t() - offset).square().mean()

    least = error()
    gradients = torch.autograd.grad(least, parts, materialize_grads=True, allow_unused=True)
    assert all(float(gradient.abs().sum()) < 1e-4 * least.item() for gradient in gradients)
    # It is the least of all, and not a place from which no small step helps: descent from elsewhere ends here too.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts:
            part.add_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(parts, max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        now = error()
        now.backward()  # type: ignore[no-untyped-call]
        return now

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert error().item() > 0.9999 * least.item()


def test_more_rank_is_nearer_and_a_full_one_exact() -> None:
    weight, d, s = problem(12, 7)
    errors = [float((d @ weight.t() - fit(weight, d, s, rank, 1e-2)(s, d)).norm()) for rank in range(8)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[7] < 1e-3 * errors[0]


def test_what_is_skipped_altogether_goes_through_the_low_rank() -> None:
    weight, d, _ = problem(12, 7)
    found = fit(weight, d, torch.zeros_like(d), 3, 1e-2)
    outputs = d @ weight.t()
    u, values, v = torch.linalg.svd(outputs - outputs.mean(0), full_matrices=False)
    best = outputs.mean(0) + (u[:, :3] * values[:3]) @ v[:3]  # no outputs of rank 3 are nearer
    torch.testing.assert_close(found(torch.zeros_like(d), d), best, rtol=1e-3, atol=1e-3)


# --- the pass ---------------------------------------------------------------------------------------------------------


def errors(surgery: Surgery) -> dict[str, float]:
    """The error of each layer on the tokens that refit held back, in percent."""
    (report,) = [report for report in surgery.reports if report.name == "refit"]
    return {change.path: float(re.findall(r"([\d.]+)%", change.after)[1]) for change in report.sites}


@pytest.mark.parametrize("kind", ["gelu", "gated", "fused", "biasless", "shared"])
def test_layers_come_nearer_at_the_same_cost(kind: str) -> None:
    inputs, plain, surgery = factors(1)[0], refitted(kind, rank=0.0), refitted(kind, Lower())
    with_rank = [path for path, rank in ranks(surgery).items() if rank]
    before, after = errors(plain), errors(surgery)
    assert with_rank
    assert all(after[path] < 0.9 * before[path] if path in with_rank else after[path] == before[path] for path in after)
    shares = []
    for one in (plain, surgery):
        _, layers = measure(one.graph.eval(), (), inputs)
        shares.append(layers_share(layers, dense_layers(one.reports)))
    assert abs(shares[1] - shares[0]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_on_other_inputs(dtype: torch.dtype) -> None:
    layer = Function(lambda m, x: m.mix(x), mix=(WIDTH, WIDTH)).eval().to(dtype)
    x, other = ([batch["x"].to(dtype) for batch in factors(seed)] for seed in (0, 1))
    found = {}
    sparse = Pipeline([SparsifyInputs(tau=TAU)]).run(layer, inputs=x[0], data=x).graph
    for rank in (0.0, 0.25):
        graph = Pipeline([Refit(rank=rank)]).run(sparse, inputs=x[0], data=x).graph.eval()
        assert {parameter.dtype for parameter in graph.parameters()} == {dtype}
        with torch.no_grad():
            found[rank] = float((torch.cat([graph(one) - layer(one) for one in other])).float().norm())
    assert found[0.25] < 0.8 * found[0.0]
    # The graph that was given is as it was.
    assert list(get_tau(sparse).values()) == [pytest.approx(TAU)]
    assert not any(node.target is add_low_rank for node in sparse.graph.nodes)


def test_the_cost_has_the_low_rank_and_tau_pays_for_it() -> None:
    plain, surgery = refitted(rank=0.0), refitted()
    inputs = factors(1)[0]
    costs = [measure(one.graph.eval(), (), inputs)[0] for one in (plain, surgery)]
    tokens, more = 8 * 5, 0
    for site, before in zip(find_sparse_linears(surgery.graph), find_sparse_linears(plain.graph), strict=True):
        low = site.rank * (site.d_in + site.d_out)
        more += low
        assert site.multiply_adds == before.multiply_adds + low
        assert float(site.tau) == pytest.approx(TAU + low / (site.d_in * site.d_out), abs=1e-6)
        assert site.describe.endswith(f", rank {site.rank}") == bool(site.rank)
    # The head runs for each sample, all other layers for each token.
    head = next(site for site in find_sparse_linears(surgery.graph) if site.path == "head.inputs")
    assert head.rank == 0
    assert costs[1].multiply_adds - costs[0].multiply_adds == tokens * more > 0
    (report,) = [report for report in surgery.reports if report.name == "refit"]
    change = next(change for change in report.sites if f"rank {ranks(surgery)[change.path]}" in change.after)
    site = next(site for site in find_sparse_linears(surgery.graph) if site.path == change.path)
    assert change.multiply_adds[1] - change.multiply_adds[0] == site.rank * (site.d_in + site.d_out)
    assert change.parameters[1] - change.parameters[0] == site.rank * (site.d_in + site.d_out)


def test_refit_again_fits_what_is_there() -> None:
    surgery, inputs = refitted(), factors(1)[0]
    once = {site.path: (site.rank, float(site.tau)) for site in find_sparse_linears(surgery.graph)}
    again = Pipeline([Refit(rank=0.0, ridge=1e-6)]).run(surgery.graph, inputs=vectors(), data=factors())
    nodes = list(again.graph.graph.nodes)
    assert sum(node.target is add_low_rank for node in nodes) == sum(rank > 0 for rank in ranks(again).values())
    for site in find_sparse_linears(again.graph):
        rank, tau = once[site.path]
        if site.rank != rank:  # it does better without
            assert site.rank == 0
            assert float(site.tau) == pytest.approx(TAU, abs=1e-6) != tau
    assert torch.isfinite(again.graph.eval()(**inputs)).all()


def test_saved_loaded_swept_trained_and_grafted(tmp_path: Path) -> None:
    surgery, inputs = refitted("gelu", Lower()), factors(1)[0]
    surgery.save(tmp_path / "saved")
    loaded = surgeon.load(tmp_path / "saved")
    assert torch.equal(loaded(**inputs), surgery.graph.eval()(**inputs))
    found = {site.path: site.rank for site in find_sparse_linears(loaded)}
    assert found == ranks(surgery)
    grafted = surgeon.graft(stack("gelu"), surgery)
    torch.testing.assert_close(grafted(**inputs), loaded(**inputs), rtol=1e-4, atol=1e-5)
    layers = {name: one for name, one in grafted.named_modules() if isinstance(one, SparseLinear)}
    assert sorted(one.shape.rank for one in layers.values()) == sorted(found.values())
    costs = [measure(one, (), inputs)[0].executed_multiply_adds for one in (loaded, grafted)]
    assert costs[0] == costs[1]
    data = surgeon.Data(factors(), loss=lambda outputs, batch: outputs.square().mean())
    masked = refitted().graph
    trained = Pipeline([Recover(steps=2, lr=1e-2)]).run(masked, inputs=vectors(), data=data).graph
    before = {name: value for name, value in masked.named_parameters() if name.endswith("low_in")}
    assert len(before) == sum(rank > 0 for rank in found.values()) > 0
    assert not any(torch.equal(trained.get_parameter(name), value) for name, value in before.items())


def test_masked_and_lowered_agree() -> None:
    masked, lowered = (refitted("gelu", *after).graph.eval() for after in ((), (Lower(),)))
    assert [site.form for site in find_sparse_linears(lowered)] == ["dynamic"] * 7
    inputs = factors(1)[0]
    surgeon.set_tau(masked, 0.0)
    surgeon.set_tau(lowered, 0.0)
    torch.testing.assert_close(masked(**inputs), lowered(**inputs), rtol=1e-4, atol=1e-5)


def test_a_layer_that_skips_nearly_all_has_no_room_for_a_rank() -> None:
    passes = [SparsifyInputs(tau=0.99), Refit(rank=0.25)]
    surgery = Pipeline(passes).run(stack("gelu"), inputs=vectors(), data=factors())
    assert set(ranks(surgery).values()) == {0}
    assert all(tau == pytest.approx(0.99) for tau in get_tau(surgery.graph).values())


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_rank_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="rank is"):
        Refit(rank=value)


# --- the operator -----------------------------------------------------------------------------------------------------


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 5), (2, 3, 4), (2, 4), (5, 2))
    y, x, low_in, low_out = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return y, x, low_in, low_out


def test_the_operator_adds_and_has_gradients() -> None:
    y, x, low_in, low_out = given()
    torch.testing.assert_close(operator(y, x, low_in, low_out), y + torch.einsum("bti,ri,or->bto", x, low_in, low_out))
    assert torch.autograd.gradcheck(operator, tuple(part.requires_grad_() for part in given()))


def test_ordinary_ops_stand_in_for_it() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return operator(*parts)  # type: ignore[no-any-return]

    with ordinary_ops():
        program = torch.export.export(Layer(), given())
    assert not any("surgeon" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given()), operator(*given()))


@pytest.mark.parametrize("place", range(4))
def test_sizes_that_do_not_fit_are_refused(place: int) -> None:
    parts = list(given())
    parts[place] = parts[place][..., :1]
    with pytest.raises(UsageError, match="do not fit together"):
        operator(*parts)


def test_a_site_without_a_low_rank_costs_what_it_did() -> None:
    graph = Pipeline([SparsifyInputs()]).run(stack("gelu"), inputs=vectors(), data=factors()).graph
    sites = find_sparse_linears(graph)
    assert all(site.rank == site.router_parameters == 0 for site in sites)
    assert all(site.output is site.nodes[-1] for site in sites)
